package node

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tailscale.com/types/key"

	"derpd/internal/testkit"
	"derpd/relay/admit"
)

// questionCounter records when questions pass to an admission URL.
type questionCounter struct {
	mu sync.Mutex
	at []time.Time
}

// front starts a proxy in front of a server, and returns its URL.
func (c *questionCounter) front(t *testing.T, server string) string {
	t.Helper()
	target, err := url.Parse(server)
	if err != nil {
		t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) }}
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		c.at = append(c.at, time.Now())
		c.mu.Unlock()
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(front.Close)
	return front.URL
}

// take returns the number of questions since the last call, and the largest number
// within a second.
func (c *questionCounter) take() (all, most int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	from := 0
	for to, at := range c.at {
		for at.Sub(c.at[from]) >= time.Second {
			from++
		}
		most = max(most, to-from+1)
	}
	all = len(c.at)
	c.at = nil
	return all, most
}

// TestRefusedClientsAreNoLoad lets 200 refused clients connect again and again. They
// cause a limited number of questions to a real headscale, and a member that is new to
// the relay is admitted meanwhile.
func TestRefusedClientsAreNoLoad(t *testing.T) {
	const (
		clients = 200
		lasts   = 8 * time.Second
		pause   = 50 * time.Millisecond // between two attempts of a client
	)
	h, member, newcomer := network(t)
	var questions questionCounter
	// Connections that are held would retry less often.
	n := begin(t, testkit.Environ(t, "DERP_VERIFY_CLIENT_URL="+questions.front(t, h.URL)+"/verify", "DERP_VERIFY_INTERVAL=1h", "DERP_TELL_CLIENTS=false"))
	r := region(t, parsePolicy(t, n.printed))
	if err := connectAs(t, r, member); err != nil {
		t.Fatal(err)
	}
	questions.take()

	ctx, cancel := context.WithTimeout(t.Context(), lasts)
	defer cancel()
	began := time.Now()
	var attempts atomic.Int64
	var trying sync.WaitGroup
	for range clients {
		c := testkit.RegionClient(t, r, key.NewNode())
		trying.Go(func() {
			for ctx.Err() == nil {
				if err := c.Connect(ctx); err == nil {
					attempts.Add(1)
					if _, err := c.Recv(); err == nil { // until the relay closes the connection
						t.Error("a stranger is admitted")
					}
				}
				select {
				case <-ctx.Done():
				case <-time.After(pause):
				}
			}
		})
		context.AfterFunc(ctx, func() { _ = c.Close() })
	}
	testkit.Until(t, "the clients are refused", func() bool { return attempts.Load() > clients })
	admittedAt := time.Now()
	testkit.Until(t, "a member that is new to this relay is admitted", func() bool { return connectAs(t, r, newcomer) == nil })
	took := time.Since(admittedAt)
	trying.Wait()

	all, most := questions.take()
	lasted := time.Since(began)
	t.Logf("%d refused clients, %d attempts in %s: %d questions to headscale, %.0f/s, at most %d within one second; limit: %d/s, and %d at once; a new member was admitted after %s",
		clients, attempts.Load(), lasted.Round(100*time.Millisecond), all, float64(all)/lasted.Seconds(), most, admit.QuestionsPerSecond, admit.QuestionsAtOnce, took.Round(time.Millisecond))
	// A question that was permitted may arrive later, but only so many run at once.
	if limit := admit.QuestionsPerSecond + admit.QuestionsAtOnce + admit.QuestionsRunning; most > limit {
		t.Errorf("%d questions within one second, want at most %d", most, limit)
	}
	if limit := int(lasted.Seconds()*admit.QuestionsPerSecond) + admit.QuestionsAtOnce + 1; all > limit {
		t.Errorf("%d questions in %s, want at most %d", all, lasted, limit)
	}
	if c := n.gate.Load().Counts(); all <= admit.QuestionsAtOnce || c.Refused+c.Limited < clients/2 || c.Unavailable > 0 {
		t.Errorf("%d questions for %d attempts: %+v", all, attempts.Load(), c)
	}
}
