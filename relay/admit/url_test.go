package admit

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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
	ctx, cancel := context.WithTimeoutCause(t.Context(), askTimeout, errNoAnswer) // as the gate does
	defer cancel()
	_, err := u.ask(ctx, newNode(), netip.Addr{})
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
		{"200 and no more", always(http.StatusOK, `{"Allow":tr`), "admission answer is no JSON object: unexpected EOF; is this Headscale's /verify?"},
		{"201 with an answer", always(http.StatusCreated, `{"Allow":true}`), "admission URL answered 201 Created; is this Headscale's /verify?"},
		{"300 without a target", always(http.StatusMultipleChoices, ``), "admission URL answered 300 Multiple Choices; is this Headscale's /verify?"},
		{"400", always(http.StatusBadRequest, ``), "admission URL answered 400 Bad Request; check http and https in the URL; is this Headscale's /verify?"},
		{"401", always(http.StatusUnauthorized, ``), "admission URL answered 401 Unauthorized; the server or a proxy wants credentials: write them into the URL (https://USER:PASSWORD@…), or let POST /verify pass without"},
		{"403", always(http.StatusForbidden, `{"Allow":false}`), "admission URL answered 403 Forbidden; a proxy or a firewall refuses this relay: let POST /verify from this relay's address pass"},
		{"404", always(http.StatusNotFound, ``), "admission URL answered 404 Not Found; the path is wrong, or Headscale is older than 0.24; is this Headscale's /verify?"},
		{"405", always(http.StatusMethodNotAllowed, ``), "admission URL answered 405 Method Not Allowed; the path is wrong; is this Headscale's /verify?"},
		{"429", always(http.StatusTooManyRequests, ``), "admission URL answered 429 Too Many Requests; the server or a proxy limits this relay: exempt POST /verify from the limit"},
		{"500", always(http.StatusInternalServerError, ``), "admission URL answered 500 Internal Server Error; the server or a proxy in front of it fails: see its log"},
		{"502 with an answer", always(http.StatusBadGateway, `{"Allow":true}`), "admission URL answered 502 Bad Gateway; the proxy in front of the server does not reach it: check that the server runs"},
		{"407", always(http.StatusProxyAuthRequired, ``), "admission URL answered 407 Proxy Authentication Required; the proxy in HTTP_PROXY or HTTPS_PROXY wants credentials: write them into that URL, or name the server in NO_PROXY"},
		{"503", always(http.StatusServiceUnavailable, ``), "admission URL answered 503 Service Unavailable; the proxy in front of the server does not reach it: check that the server runs"},
		{"504", always(http.StatusGatewayTimeout, ``), "admission URL answered 504 Gateway Timeout; the proxy in front of the server does not reach it: check that the server runs"},
		{"522", always(522, ``), "admission URL answered 522 ; the server or a proxy in front of it fails: see its log"},
		{"login page", always(http.StatusOK, "\n<!DOCTYPE html>"), "admission answer is a web page; is this Headscale's /verify?"},
		{"text", always(http.StatusOK, `OK`), "admission answer is no JSON object: invalid character 'O' looking for beginning of value; is this Headscale's /verify?"},
		{"another type", always(http.StatusOK, `"Allow"`), "admission answer is no JSON object: json: cannot unmarshal string into Go value of type struct { Allow *bool }; is this Headscale's /verify?"},
		{"nothing", always(http.StatusOK, ``), "admission answer is empty; is this Headscale's /verify?"},
		{"blanks", always(http.StatusOK, " \r\n"), "admission answer is empty; is this Headscale's /verify?"},
		{"empty object", always(http.StatusOK, `{}`), "admission answer has no field Allow; is this Headscale's /verify?"},
		{"null", always(http.StatusOK, `{"Allow":null}`), "admission answer has no field Allow; is this Headscale's /verify?"},
		{"too long", always(http.StatusOK, `{"x":"`+strings.Repeat("x", 4<<10)+`","Allow":true}`), "admission answer is no JSON object: unexpected EOF; is this Headscale's /verify?"},
		{"hung up", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "admission URL cannot be reached: EOF"},
		{"slow", func(_ http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body) // the end of a connection is noticed only after the body
			<-r.Context().Done()
		}, "admission URL cannot be reached: no answer within 3s"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := testURL(t, URLConfig{}, tt.handler)
				began := time.Now()
				err := u.answer(t)
				if err == nil || errors.Is(err, ErrRefused) || err.Error() != tt.want {
					t.Errorf("got  %v\nwant %s", err, tt.want)
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

// redirect answers with a redirect to a target.
func redirect(status int, target *string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", *target)
		w.WriteHeader(status)
	}
}

// 307 and 308 are followed, with the POST and its body, on the same server and from
// http to https. No other redirect is followed, and the error names its target without
// secrets.
func TestURLRedirect(t *testing.T) {
	var target string
	var mu sync.Mutex
	var asked []string // what the servers got at other paths than /verify
	handler := func(status int) http.Handler {
		mux := http.NewServeMux()
		mux.Handle("/verify", redirect(status, &target))
		mux.Handle("/loop", redirect(status, &target))
		mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			user, password, _ := r.BasicAuth()
			mu.Lock()
			defer mu.Unlock()
			asked = append(asked, fmt.Sprintf("%s %s as %s:%s, %t", r.Method, r.URL, user, password, strings.Contains(string(body), "nodekey:")))
			answer(w, http.StatusOK, `{"Allow":true}`)
		})
		return mux
	}
	type servers struct{ plain, secure, other *httptest.Server }
	for _, tt := range []struct {
		name   string
		status int
		from   string // scheme of the URL that is set
		target string // {plain}, {secure} and {other} stand for servers on three ports of 127.0.0.1
		want   string // error; empty if the redirect is followed
		asked  string
	}{
		{"307, path", 307, "http", "/elsewhere?x=1", "", "POST /elsewhere?x=1 as u:p, true"},
		{"308, path", 308, "http", "/elsewhere", "", "POST /elsewhere as u:p, true"},
		{"308, URL", 308, "http", "{plain}/elsewhere", "", "POST /elsewhere as u:p, true"},
		{"308, to https", 308, "http", "{secure}/elsewhere", "", "POST /elsewhere as u:p, true"},
		{"307, https", 307, "https", "/elsewhere", "", "POST /elsewhere as u:p, true"},
		{"307, other credentials", 307, "http", "http://a:b@{plain host}/elsewhere", "", "POST /elsewhere as a:b, true"},
		{"301, path", 301, "http", "/elsewhere?x=5ecfe7", "admission URL answered 301 Moved Permanently and leads to {plain}/elsewhere; set DERP_VERIFY_CLIENT_URL to that URL", ""},
		{"302, path", 302, "http", "/elsewhere", "admission URL answered 302 Found and leads to {plain}/elsewhere; set DERP_VERIFY_CLIENT_URL to that URL", ""},
		{"303, path", 303, "http", "/elsewhere", "admission URL answered 303 See Other and leads to {plain}/elsewhere; set DERP_VERIFY_CLIENT_URL to that URL", ""},
		{"301, to https", 301, "http", "{secure}/verify", "admission URL answered 301 Moved Permanently and leads to {secure}/verify; set DERP_VERIFY_CLIENT_URL to that URL", ""},
		{"302, another host", 302, "http", "https://a:5ecfe7@login.example.com/?next=5ecfe7#5ecfe7", "admission URL answered 302 Found and leads to https://login.example.com/; a redirect to another server is not followed; set DERP_VERIFY_CLIENT_URL to that URL if it is Headscale's /verify", ""},
		{"307, another host", 307, "http", "http://localhost:{plain port}/elsewhere", "admission URL answered 307 Temporary Redirect and leads to http://localhost:{plain port}/elsewhere; a redirect to another server is not followed; set DERP_VERIFY_CLIENT_URL to that URL if it is Headscale's /verify", ""},
		{"308, another port", 308, "http", "{other}/elsewhere", "admission URL answered 308 Permanent Redirect and leads to {other}/elsewhere; a redirect to another server is not followed; set DERP_VERIFY_CLIENT_URL to that URL if it is Headscale's /verify", ""},
		{"308, from https to http", 308, "https", "{plain}/elsewhere", "admission URL answered 308 Permanent Redirect and leads to {plain}/elsewhere; a redirect from https to http is not followed; correct it in the server or the proxy", ""},
		{"307, another scheme", 307, "http", "derpd-admission://127.0.0.1/", "admission URL answered 307 Temporary Redirect and leads to derpd-admission://127.0.0.1/; a redirect to another server is not followed; set DERP_VERIFY_CLIENT_URL to that URL if it is Headscale's /verify", ""},
		{"307, in a circle", 307, "http", "/loop", "admission URL answered 307 Temporary Redirect and leads to {plain}/loop; that is redirect 6; set DERP_VERIFY_CLIENT_URL to the URL that answers", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := servers{httptest.NewServer(handler(tt.status)), httptest.NewTLSServer(handler(tt.status)), httptest.NewServer(handler(tt.status))}
			for _, server := range []*httptest.Server{s.plain, s.secure, s.other} {
				t.Cleanup(server.Close)
			}
			host := strings.TrimPrefix(s.plain.URL, "http://")
			_, port, _ := strings.Cut(host, ":")
			fill := strings.NewReplacer("{plain}", s.plain.URL, "{secure}", s.secure.URL, "{other}", s.other.URL, "{plain host}", host, "{plain port}", port)
			target, asked = fill.Replace(tt.target), nil
			set := map[string]string{"http": s.plain.URL, "https": s.secure.URL}[tt.from]
			roots := x509.NewCertPool()
			roots.AddCert(s.secure.Certificate())
			// FailOpen: a redirect is not a URL that cannot be reached.
			source := URL(URLConfig{Target: strings.Replace(set, "://", "://u:p@", 1) + "/verify", Roots: roots, FailOpen: true})
			_, err := source.Ask(t.Context(), newNode(), netip.Addr{})
			if got, want := fmt.Sprint(err), cmp.Or(fill.Replace(tt.want), "<nil>"); got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
			if got := strings.Join(asked, "; "); got != tt.asked {
				t.Errorf("asked %q, want %q", got, tt.asked)
			}
		})
	}
}

// The ports of a redirect may be left out.
func TestSameServer(t *testing.T) {
	for pair, want := range map[[2]string]bool{
		{"http://h/", "http://h:80/a"}:          true,
		{"https://h/", "https://H:443/"}:        true,
		{"http://h/", "https://h/"}:             true,
		{"http://h:8080/", "https://h:8443/"}:   true,
		{"https://h/", "http://h/"}:             false,
		{"https://h:80/", "http://h/"}:          false,
		{"http://h/", "http://h:8080/"}:         false,
		{"https://h:8443/", "https://h/"}:       false,
		{"https://h/", "https://a.h/"}:          false,
		{"http://h/", "https://h.example.com/"}: false,
		{"http://[::1]/", "http://[::1]:80/"}:   true,
		{"http://h/", "http://h@other/"}:        false,
		{"http://h/", "ftp://h/"}:               false,
	} {
		from, err := url.Parse(pair[0])
		if err != nil {
			t.Fatal(err)
		}
		to, err := url.Parse(pair[1])
		if err != nil {
			t.Fatal(err)
		}
		if got := sameServer(from, to); got != want {
			t.Errorf("%s: %t", pair, got)
		}
	}
}

// A URL with the wrong scheme is answered with the fix.
func TestURLScheme(t *testing.T) {
	plain, secure := httptest.NewServer(always(http.StatusOK, `{"Allow":true}`)), httptest.NewTLSServer(always(http.StatusOK, `{"Allow":true}`))
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(plain.Close)
	t.Cleanup(secure.Close)
	for target, want := range map[string]string{
		strings.Replace(plain.URL, "http:", "https:", 1):  "admission URL cannot be reached: http: server gave HTTP response to HTTPS client; write http:// in place of https://",
		strings.Replace(secure.URL, "https:", "http:", 1): "admission URL answered 400 Bad Request; check http and https in the URL; is this Headscale's /verify?",
	} {
		if _, err := URL(URLConfig{Target: target}).Ask(t.Context(), newNode(), netip.Addr{}); fmt.Sprint(err) != want {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
}

// roundTrip is a transport that is a function.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// FailOpen admits only while the server of the URL is plainly down, and asks about each
// node. The gate does not remember the nodes that it admits.
func TestURLFailOpen(t *testing.T) {
	fails := func(err error) roundTrip {
		return func(*http.Request) (*http.Response, error) {
			return nil, &net.OpError{Op: "dial", Net: "tcp", Err: err}
		}
	}
	answers := func(status int, body string) roundTrip {
		return func(r *http.Request) (*http.Response, error) {
			w := httptest.NewRecorder()
			answer(w, status, body)
			res := w.Result()
			res.Request = r
			return res, nil
		}
	}
	silent := roundTrip(func(r *http.Request) (*http.Response, error) {
		<-r.Context().Done()
		return nil, r.Context().Err()
	})
	call := func(errno syscall.Errno) error { return os.NewSyscallError("connect", errno) }
	for _, tt := range []struct {
		name     string
		failOpen bool
		server   roundTrip
		admits   bool
	}{
		{"closed, refused connection", false, fails(call(syscall.ECONNREFUSED)), false},
		{"refused connection", true, fails(call(syscall.ECONNREFUSED)), true},
		{"no route", true, fails(call(syscall.EHOSTUNREACH)), true},
		{"no network", true, fails(call(syscall.ENETUNREACH)), true},
		{"no such host", true, fails(&net.DNSError{Err: "no such host", Name: "verify.example.com", IsNotFound: true}), true},
		{"no answer of DNS", true, fails(&net.DNSError{Err: "i/o timeout", Name: "verify.example.com", IsTimeout: true}), false},
		{"DNS is refused", true, fails(&net.DNSError{Err: "connection refused", UnwrapErr: syscall.ECONNREFUSED}), false},
		{"too many open files", true, fails(call(syscall.EMFILE)), false},
		{"too many open files on the host", true, fails(call(syscall.ENFILE)), false},
		{"no buffers", true, fails(call(syscall.ENOBUFS)), false},
		{"no memory", true, fails(call(syscall.ENOMEM)), false},
		{"two addresses", true, fails(errors.Join(call(syscall.ENETUNREACH), call(syscall.EMFILE))), false},
		{"no answer to the connection", true, fails(call(syscall.ETIMEDOUT)), false},
		{"reset", true, fails(call(syscall.ECONNRESET)), false},
		{"hung up", true, fails(io.EOF), false},
		{"slow", true, silent, false},
		{"refused", true, answers(http.StatusOK, `{"Allow":false}`), false},
		{"error page", true, answers(http.StatusBadGateway, ``), false},
		{"login page", true, answers(http.StatusOK, `<html>`), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := newAdmissionURL(URLConfig{Target: "http://verify.example.com/verify", FailOpen: tt.failOpen})
				asked := 0
				u.client.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
					asked++
					return tt.server(r)
				})
				g := newGate(t, Source{Name: "url", Ask: u.ask})
				for i := range 2 * breakAfter {
					node := newNode()
					if d, err := g.decide(t.Context(), node, netip.Addr{}); (d == admitted) != tt.admits {
						t.Errorf("question %d: %v, want admitted %t", i, err, tt.admits)
					}
					if got := u.problem(); (got != nil) != tt.admits {
						t.Errorf("the problem is %v, want one: %t", got, tt.admits)
					}
					if g.memory.knows(node) {
						t.Error("the node is remembered")
					}
				}
				if tt.admits && asked != 2*breakAfter {
					t.Errorf("admitted after %d questions", asked)
				}
			})
		})
	}
}

// Questions that the relay ends before their time admit nobody, are no failures, and keep
// the connections.
func TestURLAbandoned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		u := testURL(t, URLConfig{FailOpen: true}, func(w http.ResponseWriter, r *http.Request) {
			if asked++; asked > 2*breakAfter {
				answer(w, http.StatusOK, `{"Allow":false}`)
				return
			}
			_, _ = io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
		})
		g := newGate(t, Source{Name: "url", Ask: u.ask})
		for range 2 * breakAfter {
			ctx, cancel := context.WithTimeout(t.Context(), askTimeout-time.Millisecond)
			if d, err := g.decide(ctx, newNode(), netip.Addr{}); d != unavailable || !errors.Is(err, errAbandoned) {
				t.Errorf("%d, %v", d, err)
			}
			cancel()
		}
		if s := g.States()[0]; s.Err != nil {
			t.Errorf("the source is unavailable: %v", s.Err)
		}
		if err := u.answer(t); !errors.Is(err, ErrRefused) {
			t.Error(err)
		}
	})
}

// A relay without descriptors does not stop asking, and keeps its connections.
func TestURLExhausted(t *testing.T) {
	idle := &idleCounter{err: syscall.EMFILE}
	u := newAdmissionURL(URLConfig{Target: "http://verify.example.com/verify"})
	u.client.Transport = idle
	for range 2 * breakAfter {
		if err := u.answer(t); !errors.Is(err, syscall.EMFILE) || strings.Contains(err.Error(), "not asked") {
			t.Error(err)
		}
	}
	if idle.asked != 2*breakAfter || idle.closed > 0 {
		t.Errorf("asked %d times, and closed the idle connections %d times", idle.asked, idle.closed)
	}
}

// idleCounter is a transport that fails, and counts.
type idleCounter struct {
	err           error
	asked, closed int
}

func (c *idleCounter) RoundTrip(*http.Request) (*http.Response, error) {
	c.asked++
	return nil, c.err
}

func (c *idleCounter) CloseIdleConnections() { c.closed++ }

// A server may close an idle connection at the moment of the next question. A connection
// that the network lost is followed by a new one.
func TestURLIdleConnections(t *testing.T) {
	const together = 4
	var lost atomic.Bool
	var asked atomic.Int32
	all := make(chan struct{}) // closed when the questions at the same time have arrived
	var connections sync.Map   // client addresses that have asked
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, used := connections.Swap(r.RemoteAddr, true)
		if used && lost.Load() {
			_, _ = io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
			return
		}
		if used {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			_ = conn.Close()
			return
		}
		switch n := asked.Add(1); {
		case n == 3+together:
			close(all)
		case n > 3 && n < 3+together:
			<-all
		}
		answer(w, http.StatusOK, `{"Allow":true}`)
	}))
	t.Cleanup(server.Close)
	u := newAdmissionURL(URLConfig{Target: server.URL})
	for range 3 {
		if err := u.answer(t); err != nil {
			t.Fatalf("a question on a connection that closes: %v", err)
		}
	}
	var asking sync.WaitGroup
	for range together {
		asking.Go(func() { _ = u.answer(t) })
	}
	asking.Wait()
	lost.Store(true)
	if err := u.answer(t); !errors.Is(err, errUnreachable) {
		t.Fatalf("a lost connection gives %v", err)
	}
	if err := u.answer(t); err != nil {
		t.Errorf("after a lost connection: %v", err)
	}
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
			if _, err := u.ask(ctx, newNode(), netip.Addr{}); !errors.Is(err, errAbandoned) {
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
