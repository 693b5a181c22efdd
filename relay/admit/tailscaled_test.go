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
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/client/local"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// fakeTailscaled answers as tailscaled's LocalAPI does, in a bubble.
type fakeTailscaled struct {
	mu       sync.Mutex
	known    bool   // the node that is asked about
	status   string // of the daemon, in JSON; empty for none
	statuses int    // questions for the status
	asked    int    // questions about a node
	learns   int    // number of the question from which on the node is known; 0 for never
	member   string // key that is known, beside known

	slow time.Duration // of one status; the statuses are answered in turn
	turn chan struct{} // holds one element while a slow status is answered
}

func (f *fakeTailscaled) set(known bool, status string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.known, f.status, f.statuses, f.asked, f.learns = known, status, 0, 0, 0
}

func (f *fakeTailscaled) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if f.slow > 0 && strings.HasSuffix(r.URL.Path, "/status") {
		f.turn <- struct{}{}
		<-time.After(f.slow)
		<-f.turn
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if strings.HasSuffix(r.URL.Path, "/status") {
		f.statuses++
		if f.status == "" {
			http.Error(w, "broken", http.StatusInternalServerError)
			return
		}
		_, _ = io.WriteString(w, f.status)
		return
	}
	f.asked++
	if f.known || f.member != "" && strings.Contains(r.URL.RawQuery, f.member) || f.learns > 0 && f.asked >= f.learns {
		_, _ = io.WriteString(w, `{"Node":{"ID":1}}`)
		return
	}
	http.Error(w, "no match for IP:port", http.StatusNotFound)
}

const (
	online     = `{"BackendState":"Running","Self":{"InNetworkMap":true,"Online":true}}`
	starting   = `{"BackendState":"Starting","Self":{"InNetworkMap":true,"Online":true}}`
	offline    = `{"BackendState":"Running","Self":{"InNetworkMap":true,"Online":false}}`
	outside    = `{"BackendState":"Running","Self":{"InNetworkMap":false,"Online":true}}`
	loggedOut  = `{"BackendState":"NeedsLogin","Self":{"InNetworkMap":true,"Online":true}}`
	stopped    = `{"BackendState":"Stopped","Self":{"InNetworkMap":true,"Online":true}}`
	withoutAny = `{"BackendState":"Running"}`
)

func newFakeTailscaled(t *testing.T, grace time.Duration) (*fakeTailscaled, *tailscaled) {
	t.Helper()
	f := &fakeTailscaled{turn: make(chan struct{}, 1)}
	transport := httptest.NewTestServer(t, f).Client().Transport
	return f, newTailscaled("", &local.Client{Transport: transport}, grace)
}

func (t *tailscaled) source() Source { return Source{Ask: t.ask} }

// A known node is admitted while tailscaled is connected to its control server. An
// unknown node is refused only if tailscaled has the whole network map.
func TestTailscaledStates(t *testing.T) {
	for _, tt := range []struct {
		name, status   string
		known, unknown string // the answers
	}{
		{"online", online, "yes", "no"},
		{"starting", starting, "yes", "tailscaled is not connected yet (Starting): see tailscale status"},
		{"stopped", stopped, "yes", "tailscaled is disconnected (Stopped): run tailscale up"},
		{"offline", offline, "tailscaled has no connection to its control server: see tailscale status", "tailscaled has no connection to its control server: see tailscale status"},
		{"outside", outside, "tailscaled has no connection to its control server: see tailscale status", "tailscaled has no connection to its control server: see tailscale status"},
		{"without itself", withoutAny, "tailscaled has no connection to its control server: see tailscale status", "tailscaled has no connection to its control server: see tailscale status"},
		{"logged out", loggedOut, "tailscaled is not logged in (NeedsLogin): run tailscale up", "tailscaled is not logged in (NeedsLogin): run tailscale up"},
		{"no status", "", "asking tailscaled for its status: 500 Internal Server Error: broken; is this the socket of tailscaled?", "asking tailscaled for its status: 500 Internal Server Error: broken; is this the socket of tailscaled?"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, source := newFakeTailscaled(t, time.Hour)
				for known, want := range map[bool]string{true: tt.known, false: tt.unknown} {
					f.set(known, tt.status)
					if got := answers(t, source.source(), newNode()); strings.TrimSpace(got) != want {
						t.Errorf("known %t: %q, want %q", known, got, want)
					}
				}
			})
		})
	}
}

// Without its control server, the answers of tailscaled count for the grace.
func TestTailscaledGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, source := newFakeTailscaled(t, time.Hour)
		f.set(true, online)
		began := time.Now()
		if asOf, err := source.ask(t.Context(), newNode(), netip.Addr{}); err != nil || !asOf.Equal(began) {
			t.Errorf("%v as of %s", err, asOf)
		}
		f.set(true, offline)
		<-time.After(time.Hour)
		if asOf, err := source.ask(t.Context(), newNode(), netip.Addr{}); err != nil || !asOf.Equal(began) {
			t.Errorf("at the end of the grace: %v as of %s, want as of %s", err, asOf, began)
		}
		<-time.After(time.Second)
		if got := answers(t, source.source(), newNode()); !strings.Contains(got, "no connection to its control server") {
			t.Errorf("beyond the grace: %s", got)
		}
		f.set(true, online)
		if asOf, err := source.ask(t.Context(), newNode(), netip.Addr{}); err != nil || time.Since(asOf) > 0 {
			t.Errorf("connected again: %v as of %s", err, asOf)
		}
	})
}

// A good status serves for a second to admit, and never to refuse.
func TestTailscaledStatusIsReused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, source := newFakeTailscaled(t, time.Hour)
		want := func(when string, statuses int) {
			t.Helper()
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.statuses != statuses {
				t.Errorf("%s: %d questions for the status, want %d", when, f.statuses, statuses)
			}
		}
		f.set(true, online)
		for range 3 {
			_ = answers(t, source.source(), newNode())
		}
		want("three nodes at the same time", 1)
		<-time.After(time.Second)
		_ = answers(t, source.source(), newNode())
		want("after a second", 1)
		<-time.After(time.Millisecond)
		_ = answers(t, source.source(), newNode())
		want("after more than a second", 2)
		<-time.After(100 * time.Millisecond)
		f.set(false, online)
		_ = answers(t, source.source(), newNode())
		want("a refusal soon after", 1)
		<-time.After(2 * time.Second)
		f.set(true, stopped)
		_ = answers(t, source.source(), newNode())
		_ = answers(t, source.source(), newNode())
		want("a bad status", 2)
	})
}

// Nodes at the same time share a status, which was requested after their questions.
func TestTailscaledStatusIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, source := newFakeTailscaled(t, time.Hour)
		f.set(false, online)
		f.slow = 100 * time.Millisecond
		began := time.Now()
		var asking sync.WaitGroup
		ask := func(n int) {
			for range n {
				asking.Go(func() {
					if _, err := source.ask(t.Context(), newNode(), netip.Addr{}); !errors.Is(err, ErrRefused) {
						t.Error(err)
					}
				})
			}
		}
		ask(1)
		<-time.After(50 * time.Millisecond)
		ask(100) // the status under way was requested before
		<-time.After(100 * time.Millisecond)
		ask(100)
		asking.Wait()
		if took := time.Since(began); f.statuses != 3 || took != 300*time.Millisecond+mapDelay {
			t.Errorf("%d statuses, in %s", f.statuses, took)
		}
	})
}

// A question that ends while another one waits for the status takes no longer, and does
// not end the other one.
func TestTailscaledStatusObeysContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, source := newFakeTailscaled(t, time.Hour)
		f.set(false, online)
		f.slow = time.Second
		began := time.Now()
		var asking sync.WaitGroup
		ask := func(limit, after time.Duration, want error) {
			asking.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), limit)
				defer cancel()
				if _, err := source.ask(ctx, newNode(), netip.Addr{}); !errors.Is(err, want) || time.Since(began) != after {
					t.Errorf("with %s: %v after %s, want %v after %s", limit, err, time.Since(began), want, after)
				}
			})
			synctest.Wait()
		}
		ask(600*time.Millisecond, 600*time.Millisecond, context.DeadlineExceeded) // requests the status
		ask(500*time.Millisecond, 500*time.Millisecond, context.DeadlineExceeded) // waits for it
		// The fake answers the first status after a second, although nobody waits for it.
		ask(time.Minute, 2*time.Second+mapDelay, ErrRefused)
		asking.Wait()
		if s := source.last.Load(); s == nil || s.problem != nil {
			t.Errorf("the last status is %+v", s)
		}
	})
}

// While 1200 strangers ask a tailscaled whose status takes 5 ms, members are admitted
// within a second, and the source stays available.
func TestTailscaledFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, source := newFakeTailscaled(t, time.Hour)
		f.set(false, online)
		f.slow = 5 * time.Millisecond
		var log testkit.Buffer
		g := NewGate(Config{Sources: []Source{source.source()}, Grace: time.Hour, Path: filepath.Join(t.TempDir(), "admitted.json"), Log: zerolog.New(&log)})
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		for i := range 1200 {
			running.Go(func() {
				for ctx.Err() == nil {
					_ = g.Admit(ctx, randomNode(), numberedAddr(i))
					<-time.After(2 * time.Second)
				}
			})
		}
		<-time.After(10 * time.Second)
		for range 10 {
			member := randomNode()
			f.mu.Lock()
			f.member = member.UntypedHexString()
			f.mu.Unlock()
			for what, most := range map[string]time.Duration{"a new member": time.Second, "a known member": 100 * time.Millisecond} {
				if what == "a known member" {
					g.memory.remember(member, time.Now())
				} else {
					g.memory.forget(member)
				}
				took := connect(g, member, netip.MustParseAddr("192.0.2.1"))
				if took > most {
					t.Errorf("%s was admitted after %s", what, took)
				}
				t.Logf("%s was admitted after %s", what, took)
			}
		}
		cancel()
		running.Wait()
		if log.String() != "" || g.Counts().Unavailable > 0 {
			t.Errorf("%+v, logged %s", g.Counts(), log.String())
		}
	})
}

// A node that appears in the network map within half a second is not refused.
func TestTailscaledLearns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, source := newFakeTailscaled(t, time.Hour)
		f.set(false, online)
		f.learns = 2
		began := time.Now()
		if asOf, err := source.ask(t.Context(), newNode(), netip.Addr{}); err != nil || time.Since(began) != 500*time.Millisecond || time.Since(asOf) > 0 {
			t.Errorf("%v as of %s, after %s", err, asOf, time.Since(began))
		}
		f.set(false, online)
		if asOf, err := source.ask(t.Context(), newNode(), netip.Addr{}); !errors.Is(err, ErrRefused) || time.Since(asOf) > 0 || f.asked != 2 {
			t.Errorf("%v as of %s, after %d questions", err, asOf, f.asked)
		}
	})
}

// The versions are named if tailscaled is too old (tailscale/tailscale#12617).
func TestTailscaledTooOld(t *testing.T) {
	dir, err := os.MkdirTemp("", "admit") // t.TempDir is too long for a socket on some systems
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "socket")
	source := Tailscaled(socket, time.Hour)
	if source.Name != "tailscaled "+socket || source.Local {
		t.Errorf("%+v", source)
	}
	if got := answers(t, source, newNode()); !strings.HasPrefix(got, "asking tailscaled: ") {
		t.Errorf("without a socket: %s", got)
	}
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
	want := "tailscaled 1.68.1 cannot be asked about node keys, which needs 1.70: update it to 1."
	if got := answers(t, source, newNode()); !strings.HasPrefix(got, want) {
		t.Errorf("%s, want %s…", got, want)
	}
}

// A tailscaled that does not answer is reported without the URL of the question, which
// has the key of a node.
func TestSilentTailscaled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tailscaled.sock")
	ln, err := new(net.ListenConfig).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = Tailscaled(path, time.Hour).Ask(ctx, key.NewNode().Public(), netip.Addr{})
	if !errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), "nodekey") || strings.Contains(err.Error(), "://") {
		t.Errorf("got %v", err)
	}
}
