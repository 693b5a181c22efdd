package admit

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// verifier is an admission URL with a number of workers, each of which needs a time for
// an answer.
type verifier struct {
	workers chan struct{}
	took    time.Duration

	mu      sync.Mutex
	members map[key.NodePublic]bool
	refused []time.Time
}

func newVerifier() *verifier {
	return &verifier{workers: make(chan struct{}, 8), took: 100 * time.Millisecond, members: make(map[key.NodePublic]bool)}
}

func (v *verifier) set(node key.NodePublic, member bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.members[node] = member
}

func (v *verifier) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var question tailcfg.DERPAdmitClientRequest
	_ = json.NewDecoder(r.Body).Decode(&question)
	_, _ = io.Copy(io.Discard, r.Body)
	v.workers <- struct{}{}
	<-time.After(v.took)
	<-v.workers
	v.mu.Lock()
	member := v.members[question.NodePublic]
	if !member {
		v.refused = append(v.refused, time.Now())
	}
	v.mu.Unlock()
	_ = json.NewEncoder(w).Encode(tailcfg.DERPAdmitClientResponse{Allow: member})
}

// within is the largest number of refused questions within a time.
func (v *verifier) within(span time.Duration) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	most, from := 0, 0
	for to, at := range v.refused {
		for at.Sub(v.refused[from]) >= span {
			from++
		}
		most = max(most, to-from+1)
	}
	return most
}

// flood is 800 strangers, who make 400 attempts a second.
type flood struct {
	uses      int // attempts with one key; 0 is any number
	addresses int
}

const floodStrangers = 800

// start runs the strangers until ctx ends.
func (f flood) start(ctx context.Context, running *sync.WaitGroup, g *Gate) {
	for i := range floodStrangers {
		running.Go(func() {
			addr := numberedAddr(i % f.addresses)
			for node, used := randomNode(), 0; ctx.Err() == nil; {
				if f.uses > 0 && used >= f.uses {
					node, used = randomNode(), 0
				}
				used++
				_ = g.Admit(ctx, node, addr)
				select {
				case <-ctx.Done():
				case <-time.After(time.Second + rand.N(2*time.Second)):
				}
			}
		})
	}
}

// left waits until a node is disconnected, and returns how long it took.
func (c *crowd) left(node key.NodePublic) time.Duration {
	began := time.Now()
	for {
		c.mu.Lock()
		_, here := c.here[node]
		c.mu.Unlock()
		if !here {
			return time.Since(began)
		}
		<-time.After(20 * time.Millisecond)
	}
}

// connect tries as tailscaled does, and returns how long it took.
func connect(g *Gate, node key.NodePublic, addr netip.Addr) time.Duration {
	began := time.Now()
	for n := 1; time.Since(began) < time.Minute; n++ {
		err := g.Admit(context.Background(), node, addr)
		pause := min(time.Duration(n*n)*10*time.Millisecond, 5*time.Second)
		pause = pause/2 + rand.N(pause)
		switch {
		case err == nil:
			return time.Since(began)
		case errors.Is(err, ErrTooManyForLong): // the relay holds the connection
			n, pause = 0, 5*time.Second+rand.N(5*time.Second/4)
		case errors.Is(err, ErrRefused): // as without DERP_TELL_CLIENTS
			n, pause = 0, time.Second
		}
		<-time.After(20*time.Millisecond + pause)
	}
	return time.Since(began)
}

// While 800 strangers ask a source of eight workers that needs 100 ms: new members are
// admitted, also a node that was refused a moment ago, and members that are known; a
// node that was removed is disconnected; strangers cause a limited number of questions.
func TestFlood(t *testing.T) {
	const (
		interval = 2 * time.Second
		attempts = 10
		never    = time.Duration(-1) // not promised
	)
	// The address of the flood, of a member, and of nobody else.
	theirs, home, new := numberedAddr(0), netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1")
	for name, tt := range map[string]struct {
		flood
		newcomer, neighbour, atHome, added time.Duration // the longest time to be admitted
	}{
		"fresh keys, one address":      {flood{1, 1}, 2 * time.Second, 2 * time.Second, 2 * time.Second, 5 * time.Second},
		"fresh keys, 800 addresses":    {flood{1, 800}, 2 * time.Second, 2 * time.Second, 2 * time.Second, 5 * time.Second},
		"keys used twice, one address": {flood{2, 1}, 2 * time.Second, never, 2 * time.Second, 5 * time.Second},
		"keys used twice, anywhere":    {flood{2, 800}, never, never, 2 * time.Second, 5 * time.Second},
		"same keys, one address":       {flood{0, 1}, 2 * time.Second, never, 2 * time.Second, 5 * time.Second},
		"same keys, 800 addresses":     {flood{0, 800}, 2 * time.Second, 2 * time.Second, 2 * time.Second, never},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "admitted.json")
			synctest.Test(t, func(t *testing.T) {
				var log testkit.Buffer
				v := newVerifier()
				u := testURL(t, URLConfig{FailOpen: true, Log: zerolog.New(&log)}, v.ServeHTTP)
				g := NewGate(Config{
					Sources: []Source{{Name: "url", Ask: u.ask}}, Grace: time.Hour, Path: path, Interval: interval,
					MemberAddr: func(addr netip.Addr) bool { return addr == home }, Log: zerolog.New(&log),
				})
				c := &crowd{here: make(map[key.NodePublic]netip.Addr)}
				for range 100 {
					node := randomNode()
					v.set(node, true)
					c.here[node] = home
				}
				stop := run(t, g, c.clients())
				ctx, cancel := context.WithCancel(t.Context())
				var running sync.WaitGroup
				tt.start(ctx, &running, g)
				<-time.After(10 * time.Second)
				if tt.uses == 0 {
					<-time.After(100 * time.Second) // until they were refused
				}

				var worst struct{ newcomer, neighbour, atHome, added, known, revoked time.Duration }
				member := func() key.NodePublic {
					node := randomNode()
					v.set(node, true)
					return node
				}
				for range attempts {
					var trying sync.WaitGroup
					for _, m := range []struct {
						addr  netip.Addr
						most  time.Duration
						worst *time.Duration
					}{{new, tt.newcomer, &worst.newcomer}, {theirs, tt.neighbour, &worst.neighbour}, {home, tt.atHome, &worst.atHome}} {
						if m.most != never {
							trying.Go(func() { *m.worst = max(*m.worst, connect(g, member(), m.addr)) })
						}
					}
					if tt.added != never {
						trying.Go(func() {
							node := randomNode()
							g.strangers.remember(node)
							v.set(node, true)
							worst.added = max(worst.added, connect(g, node, new))
						})
					}
					trying.Go(func() {
						node := member()
						g.memory.remember(node, time.Now())
						worst.known = max(worst.known, connect(g, node, theirs))
						c.mu.Lock()
						c.here[node] = theirs
						c.mu.Unlock()
						<-time.After(rand.N(interval))
						v.set(node, false)
						worst.revoked = max(worst.revoked, c.left(node))
					})
					trying.Wait()
				}
				t.Logf("admitted after at most: a new member %s, at the address of the strangers %s, at the address of a member %s, refused before %s, known %s; disconnected after %s; %d questions in 10 s",
					worst.newcomer, worst.neighbour, worst.atHome, worst.added, worst.known, worst.revoked, v.within(10*time.Second))
				if worst.newcomer > tt.newcomer && tt.newcomer != never || worst.neighbour > tt.neighbour && tt.neighbour != never ||
					worst.atHome > tt.atHome || worst.added > tt.added && tt.added != never || worst.known > time.Second || worst.revoked > interval+5*time.Second {
					t.Error("too late")
				}
				// The gate asks about its own key and the removed nodes too.
				const own = 2 * 10
				if got := v.within(10 * time.Second); got > 10*20+12+own {
					t.Errorf("%d questions about strangers within 10 s", got)
				}
				if text := log.String(); strings.Contains(text, "admission source") || strings.Contains(text, "anybody") {
					t.Errorf("logged %s", text)
				}
				if counts := g.Counts(); counts.Kept > 0 || counts.Unavailable > 0 || len(c.here) != 100 {
					t.Errorf("counted %+v, and %d of 100 members are connected", counts, len(c.here))
				}
				cancel()
				running.Wait()
				stop()
			})
		})
	}
}
