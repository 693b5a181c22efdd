package admit

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"
)

// source answers every question alike.
func source(name string, err error) Source {
	return Source{Name: name, Ask: func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) { return time.Now(), err }}
}

// listed is source, from memory.
func listed(name string, err error) Source {
	s := source(name, err)
	s.Local = true
	return s
}

var errBroken = errors.New("connection refused")

func newGate(t *testing.T, sources ...Source) *Gate {
	t.Helper()
	return NewGate(Config{Sources: sources, Grace: time.Hour, Path: filepath.Join(t.TempDir(), "admitted.json"), Log: zerolog.Nop()})
}

func TestGate(t *testing.T) {
	for _, tt := range []struct {
		name    string
		sources []Source
		want    string // in the refusal; empty for a yes
		down    string
		counts  Counts
	}{
		{"no source", nil, "is not admitted", "", Counts{Refused: 1}},
		{"yes", []Source{source("a", nil)}, "", "", Counts{Admitted: 1}},
		{"no", []Source{source("a", ErrRefused)}, "a: unknown node key", "", Counts{Refused: 1}},
		{"no and yes", []Source{source("a", ErrRefused), source("b", nil)}, "", "", Counts{Admitted: 1}},
		{"broken and yes", []Source{source("a", errBroken), source("b", nil)}, "", "", Counts{Admitted: 1}},
		{"no and broken", []Source{source("a", ErrRefused), source("b", errBroken)}, "b: connection refused", "b", Counts{Unavailable: 1}},
		{"listed", []Source{source("a", errBroken), listed("b", nil)}, "", "", Counts{Admitted: 1}},
		{"not listed, yes", []Source{listed("a", ErrRefused), source("b", nil)}, "", "", Counts{Admitted: 1}},
		{"not listed", []Source{listed("a", ErrRefused)}, "a: unknown node key", "", Counts{Refused: 1}},
		{"stale list", []Source{listed("a", errBroken), source("b", ErrRefused)}, "a: connection refused", "a", Counts{Unavailable: 1}},
	} {
		g := newGate(t, tt.sources...)
		err := g.Admit(t.Context(), key.NewNode().Public(), netip.Addr{})
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q in it", tt.name, err, tt.want)
		}
		for _, s := range g.States() {
			if down := s.Err != nil; down != (s.Source == tt.down) && tt.want != "" {
				t.Errorf("%s: %s is down: %t (%v)", tt.name, s.Source, down, s.Err)
			}
		}
		if got := g.Counts(); got != tt.counts {
			t.Errorf("%s: counted %+v, want %+v", tt.name, got, tt.counts)
		}
	}
}

// A yes need not wait for a source that hangs, and a list is not worth a
// question to anybody else.
func TestFirstYesWins(t *testing.T) {
	hang := Source{Name: "slow", Ask: func(ctx context.Context, _ key.NodePublic, _ netip.Addr) (time.Time, error) {
		<-ctx.Done()
		return time.Time{}, ctx.Err()
	}}
	g := newGate(t, hang, source("fast", nil))
	if err := g.Admit(t.Context(), key.NewNode().Public(), netip.Addr{}); err != nil {
		t.Error(err)
	}
	never := Source{Name: "never", Ask: func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) {
		t.Error("asked about a node that a list admits")
		return time.Time{}, nil
	}}
	g = newGate(t, never, listed("list", nil))
	if err := g.Admit(t.Context(), key.NewNode().Public(), netip.Addr{}); err != nil {
		t.Error(err)
	}
}

// A source that comes back is no longer called down.
func TestSourceComesBack(t *testing.T) {
	answer := errors.New("timeout")
	g := newGate(t, Source{Name: "a", Ask: func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) { return time.Now(), answer }})
	_ = g.Admit(t.Context(), key.NewNode().Public(), netip.Addr{})
	if g.States()[0].Err == nil {
		t.Error("a source that timed out is not down")
	}
	answer = ErrRefused
	_ = g.Admit(t.Context(), key.NewNode().Public(), netip.Addr{})
	if g.States()[0].Err != nil {
		t.Error("a source that answered no is down")
	}
}

func TestParseKeys(t *testing.T) {
	a, b := key.NewNode().Public(), key.NewNode().Public()
	keys, err := ParseKeys("# two nodes\n" + a.String() + ", " + b.String() + " # phone\r\n\n" + a.String())
	if err != nil || len(keys) != 2 || keys.ask(a) != nil || keys.ask(b) != nil {
		t.Errorf("%v, %v", keys, err)
	}
	if err := keys.ask(key.NewNode().Public()); !errors.Is(err, ErrRefused) {
		t.Errorf("a stranger: %v", err)
	}
	for text, want := range map[string]string{
		"":                                      "holds no node key",
		"# only a comment":                      "holds no node key",
		"x\n" + a.String() + "\nnodekey:zz":     "line 3",
		"nodekey:" + strings.Repeat("0", 64):    `line 1: want nodekey: and 64 hex digits`,
		"mkey:" + strings.Repeat("a", 64):       "line 1",
		"privkey:" + strings.Repeat("5ecfe", 9): "got a private key",
	} {
		_, err := ParseKeys(text)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q in it", text, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "5ecfe") {
			t.Errorf("the message shows a private key: %v", err)
		}
	}
}

func FuzzParseKeys(f *testing.F) {
	f.Add("nodekey:" + strings.Repeat("ab", 32) + "\n# x\nnodekey:12, y")
	f.Add("\x00\xff,,,##\n\r")
	f.Fuzz(func(t *testing.T, text string) {
		keys, err := ParseKeys(text)
		if err == nil && len(keys) == 0 {
			t.Error("no key and no error")
		}
		for k := range keys {
			if k.IsZero() {
				t.Error("the zero key was taken")
			}
		}
	})
}

// Nothing but a JSON object whose Allow is true is a yes.
func FuzzParseAnswer(f *testing.F) {
	for _, seed := range []string{`{"Allow":true}`, `{"Allow":false}`, `{"allow":true}`, `{}`, `<html>`, `{"Allow":"true"}`, `[true]`, `{"Allow":true`, `true`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, answer string) {
		if parseAnswer(strings.NewReader(answer)) == nil && !strings.Contains(answer, "true") {
			t.Errorf("%q is a yes", answer)
		}
	})
}

// A tailscaled before 1.70 answers so (tailscale/tailscale#12617).
func TestTailscaledTooOld(t *testing.T) {
	dir, err := os.MkdirTemp("", "admit") // t.TempDir is too long for a socket on some systems
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "socket")
	ln, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &httptest.Server{Listener: ln, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/localapi/v0/status" {
			_, _ = io.WriteString(w, `{"Version":"1.68.1-tf02ad8397-g1234","BackendState":"Running"}`)
			return
		}
		http.Error(w, "invalid 'addr' parameter", http.StatusBadRequest)
	})}}
	server.Start()
	t.Cleanup(server.Close)
	_, err = Tailscaled(socket, time.Hour).Ask(t.Context(), key.NewNode().Public(), netip.Addr{})
	want := "tailscaled 1.68.1 cannot be asked about node keys, which came with 1.70: update it to 1."
	if err == nil || errors.Is(err, ErrRefused) || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("%v, want %s…", err, want)
	}
}

func TestRedacted(t *testing.T) {
	if got := redacted("https://user:pass@h.example.com/verify?token=1#x"); got != "https://h.example.com/verify" {
		t.Errorf("got %s", got)
	}
}
