package admit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tailscale.com/tailcfg"
)

// testURL is an admission URL whose requests go to handler, in a bubble.
func testURL(t *testing.T, c URLConfig, handler http.HandlerFunc) *admissionURL {
	t.Helper()
	c.Target = "http://verify.example.com/verify?token=5ecfe7"
	u := newAdmissionURL(c)
	u.client.Transport = httptest.NewTestServer(t, handler).Client().Transport
	return u
}

func (u *admissionURL) answer(t *testing.T) error {
	t.Helper()
	_, err := u.ask(t.Context(), newNode(), netip.Addr{})
	return err
}

// The question and its answers are those of derper.
func TestURL(t *testing.T) {
	member := newNode()
	addr := netip.MustParseAddr("2001:db8::7")
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var question tailcfg.DERPAdmitClientRequest
		if err := json.NewDecoder(r.Body).Decode(&question); err != nil || question.Source != addr {
			t.Errorf("asked %+v, %v", question, err)
		}
		if r.Method != http.MethodPost || r.URL.String() != "/verify?token=1" || r.Header.Get("Content-Type") != "application/json" {
			t.Errorf("asked by %s %s, %v", r.Method, r.URL, r.Header)
		}
		_ = json.NewEncoder(w).Encode(tailcfg.DERPAdmitClientResponse{Allow: question.NodePublic == member})
	}))
	t.Cleanup(server.Close)
	s := URL(URLConfig{Target: server.URL + "/verify?token=1"})
	if s.Name != "url "+server.URL+"/verify" || s.Local {
		t.Errorf("%+v", s)
	}
	if asOf, err := s.Ask(t.Context(), member, addr); err != nil || time.Since(asOf) > time.Minute {
		t.Errorf("a member: %v as of %s", err, asOf)
	}
	if asOf, err := s.Ask(t.Context(), newNode(), addr); !errors.Is(err, ErrRefused) || time.Since(asOf) > time.Minute {
		t.Errorf("another node: %v as of %s", err, asOf)
	}
}

// Everything but a clear answer is an error, and not a refusal.
func TestURLUnavailable(t *testing.T) {
	for _, tt := range []struct {
		name    string
		handler http.HandlerFunc
		want    string
	}{
		{"502 with an answer", always(http.StatusBadGateway, `{"Allow":true}`), "admission URL answered 502 Bad Gateway"},
		{"201 with an answer", always(http.StatusCreated, `{"Allow":true}`), "admission URL answered 201 Created"},
		{"403", always(http.StatusForbidden, `{"Allow":false}`), "admission URL answered 403 Forbidden"},
		{"login page", always(http.StatusOK, `<html>`), "reading admission answer: "},
		{"nothing", always(http.StatusOK, ``), "reading admission answer: EOF"},
		{"empty object", always(http.StatusOK, `{}`), "has no field Allow"},
		{"null", always(http.StatusOK, `{"Allow":null}`), "has no field Allow"},
		{"too long", always(http.StatusOK, `{"x":"`+strings.Repeat("x", 4<<10)+`","Allow":true}`), "unexpected EOF"},
		{"hung up", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "admission URL cannot be reached: EOF"},
		{"slow", func(_ http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body) // the end of a connection is noticed only after the body
			<-r.Context().Done()
		}, "admission URL cannot be reached: context deadline exceeded"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := testURL(t, URLConfig{}, tt.handler)
				began := time.Now()
				err := u.answer(t)
				if err == nil || errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%v, want %q in it", err, tt.want)
				}
				if err != nil && strings.Contains(err.Error(), "5ecfe7") {
					t.Errorf("the message shows the token: %v", err)
				}
				if took := time.Since(began); took > 0 && (tt.name != "slow" || took != 3*time.Second) {
					t.Errorf("took %s", took)
				}
			})
		})
	}
}

// Redirects are not followed, whatever their target would answer.
func TestURLRedirect(t *testing.T) {
	for _, status := range []int{http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect} {
		mux := http.NewServeMux()
		mux.Handle("/verify", http.RedirectHandler("/elsewhere", status))
		mux.HandleFunc("/elsewhere", func(w http.ResponseWriter, _ *http.Request) {
			t.Errorf("%d: the redirect was followed", status)
			_, _ = io.WriteString(w, `{"Allow":true}`)
		})
		server := httptest.NewServer(mux)
		t.Cleanup(server.Close)
		s := URL(URLConfig{Target: server.URL + "/verify"})
		_, err := s.Ask(t.Context(), newNode(), netip.Addr{})
		if want := fmt.Sprintf("admission URL answered %d", status); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%d: %v, want %s…", status, err, want)
		}
	}
}

// FailOpen admits only while the URL cannot be reached. The gate does not remember the
// nodes that it admits.
func TestURLFailOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hangUp := func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
		for _, tt := range []struct {
			name     string
			failOpen bool
			handler  http.HandlerFunc
			admits   bool
		}{
			{"closed, unreachable", false, hangUp, false},
			{"open, unreachable", true, hangUp, true},
			{"open, refused", true, always(http.StatusOK, `{"Allow":false}`), false},
			{"open, error page", true, always(http.StatusBadGateway, ``), false},
			{"open, login page", true, always(http.StatusOK, `<html>`), false},
		} {
			u := testURL(t, URLConfig{FailOpen: tt.failOpen}, tt.handler)
			for i := range 2 * breakAfter {
				asOf, err := u.ask(t.Context(), newNode(), netip.Addr{})
				if (err == nil) != tt.admits {
					t.Errorf("%s: question %d: %v, want admitted %t", tt.name, i, err, tt.admits)
				}
				if err == nil && !asOf.IsZero() {
					t.Errorf("%s: admitted as of %s, which would be remembered", tt.name, asOf)
				}
			}
		}
	})
}

// At most 32 questions run at the same time, and waiting for a slot counts
// towards the timeout.
func TestURLAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var running, most atomic.Int32
		u := testURL(t, URLConfig{}, func(w http.ResponseWriter, _ *http.Request) {
			most.Store(max(most.Load(), running.Add(1)))
			<-time.After(2 * time.Second)
			running.Add(-1)
			answer(w, http.StatusOK, `{"Allow":true}`)
		})
		var asking sync.WaitGroup
		errs := make(chan error, 100)
		for range 33 {
			asking.Go(func() { errs <- u.answer(t) })
		}
		<-time.After(time.Second)
		synctest.Wait()
		if most.Load() != 32 || running.Load() != 32 {
			t.Errorf("%d questions at the same time, and %d now, want 32", most.Load(), running.Load())
		}
		asking.Wait()
		close(errs)
		late := 0
		for err := range errs {
			if err != nil {
				late++
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
			}
		}
		if late != 1 {
			t.Errorf("%d questions timed out, want the one that waited for 2 s", late)
		}

		// Every slot is free again.
		for range urlAtOnce {
			asking.Go(func() {
				if err := u.answer(t); err != nil {
					t.Error(err)
				}
			})
		}
		asking.Wait()
		for range urlAtOnce {
			u.slots <- struct{}{}
		}
		if err := u.answer(t); err == nil || !strings.HasPrefix(err.Error(), "waiting for 32 other questions") || errors.Is(err, errUnreachable) {
			t.Error(err)
		}
	})
}

// After five consecutive failures the URL is left alone for two seconds, and
// then asked one question.
func TestURLBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked, status, body := 0, http.StatusBadGateway, `{"Allow":false}`
		u := testURL(t, URLConfig{}, func(w http.ResponseWriter, _ *http.Request) {
			asked++
			answer(w, status, body)
		})
		want := func(when string, questions int, texts ...string) {
			t.Helper()
			err := u.answer(t)
			if err == nil || asked != questions {
				t.Errorf("%s: %v after %d questions, want %d", when, err, asked, questions)
			}
			for _, text := range texts {
				if err != nil && !strings.Contains(err.Error(), text) {
					t.Errorf("%s: %v, want %q in it", when, err, text)
				}
			}
		}
		for i := range 4 {
			want("a failure", i+1, "answered 502")
		}
		status = http.StatusOK
		want("a refusal", 5, "unknown node key")
		status = http.StatusBadGateway
		for i := range 5 {
			want("a failure after a refusal", i+6, "answered 502")
		}
		want("a sixth failure", 10, "not asked for a moment", "answered 502")
		<-time.After(1900 * time.Millisecond)
		want("after 1.9 s", 10, "not asked for a moment", "answered 502")
		<-time.After(200 * time.Millisecond)
		want("after 2.1 s", 11, "answered 502")
		want("after a question that failed", 11, "not asked for a moment", "answered 502")
		<-time.After(2100 * time.Millisecond)
		status = http.StatusOK
		want("after a question that was answered", 12, "unknown node key")
		want("after a question that was answered", 13, "unknown node key")
	})
}

// Questions that the gate drops are no failures.
func TestURLDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var answers atomic.Bool
		u := testURL(t, URLConfig{}, func(w http.ResponseWriter, r *http.Request) {
			if !answers.Load() {
				_, _ = io.Copy(io.Discard, r.Body)
				<-r.Context().Done()
				return
			}
			answer(w, http.StatusOK, `{"Allow":true}`)
		})
		for range 2 * breakAfter {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(time.Second, cancel)
			if _, err := u.ask(ctx, newNode(), netip.Addr{}); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
		answers.Store(true)
		if err := u.answer(t); err != nil {
			t.Error(err)
		}
	})
}

// An answer admits only if it is a JSON object with Allow true, and refuses only
// with Allow false.
func FuzzParseAnswer(f *testing.F) {
	for _, seed := range []string{`{"Allow":true}`, `{"Allow":false}`, `{"allow":true}`, `{}`, `<html>`, `{"Allow":"true"}`, `[true]`, `{"Allow":true`, `true`, `{"x":{"Allow":true}}`, `{"Allow":false,"Allow":true}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		err := parseAnswer(bytes.NewReader(answer))
		if err != nil && !errors.Is(err, ErrRefused) {
			return
		}
		var fields map[string]json.RawMessage
		if err := json.NewDecoder(bytes.NewReader(answer)).Decode(&fields); err != nil {
			t.Fatalf("%q is an answer, but no JSON object: %v", answer, err)
		}
		for name, value := range fields {
			if strings.EqualFold(name, "allow") && string(value) == strconv.FormatBool(err == nil) {
				return
			}
		}
		t.Errorf("%q: %v", answer, err)
	})
}

func TestRedactURL(t *testing.T) {
	for target, want := range map[string]string{
		"https://user:pass@h.example.com/verify?token=1#x": "https://h.example.com/verify",
		"http://192.0.2.1:8080/":                           "http://192.0.2.1:8080/",
		"ftp://user@h/":                                    "ftp://h/",
		"http://user:pass@h/%zz?token=1":                   "(unparsable URL)",
		"user:pass@h/verify":                               "(unparsable URL)",
		"pass@h":                                           "(unparsable URL)",
		"privkey:1234":                                     "(unparsable URL)",
		"tskey-api-1234":                                   "(unparsable URL)",
		"https://h/tailnet/you@example.com/devices":        "https://h/tailnet/you@example.com/devices",
		"h.example.com/verify?token=1":                     "h.example.com/verify",
	} {
		if got := RedactURL(target); got != want {
			t.Errorf("%s: got %s, want %s", target, got, want)
		}
	}
}
