package relay

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
)

// response returns the JSON that clients get.
func (b *BootstrapDNS) response(t *testing.T) string {
	t.Helper()
	w := httptest.NewRecorder()
	b.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/bootstrap-dns", http.NoBody))
	return w.Body.String()
}

// A failed look-up leaves out the name. If every look-up fails, the previous
// addresses stay.
func TestBootstrapDNSFailures(t *testing.T) {
	b := NewBootstrapDNS([]string{"localhost", "name.invalid"}, zerolog.Nop())
	b.resolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("no network")
	}}
	b.refresh(t.Context())
	before := b.response(t)
	if !strings.Contains(before, `"localhost"`) || !strings.Contains(before, `"127.0.0.1"`) || strings.Contains(before, "invalid") {
		t.Errorf("the response is %s", before)
	}
	b.names = []string{"name.invalid"}
	b.refresh(t.Context())
	if got := b.response(t); got != before {
		t.Errorf("after a failure the response is %s, want the previous one", got)
	}
}

// Names are looked up at the start and every ten minutes. Without names Run
// only waits.
func TestBootstrapDNSInterval(t *testing.T) {
	// Package net makes its configuration at the first look-up, with a channel
	// that must not belong to a bubble.
	if _, err := (&net.Resolver{PreferGo: true}).LookupHost(t.Context(), "localhost"); err != nil {
		t.Fatal(err)
	}
	for names, want := range map[string]int64{"name.invalid": 3, "": 0} {
		synctest.Test(t, func(t *testing.T) {
			b := NewBootstrapDNS(strings.Fields(names), zerolog.Nop())
			var lookups atomic.Int64
			b.resolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
				if deadline, _ := ctx.Deadline(); time.Until(deadline) > time.Minute {
					t.Errorf("a look-up may take %v", time.Until(deadline))
				}
				lookups.Add(1)
				return nil, errors.New("no network")
			}}
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- b.Run(ctx) }()
			<-time.After(time.Second)
			each := max(lookups.Load(), 1) // queries of one look-up
			<-time.After(20 * time.Minute)
			if got := lookups.Load() / each; got != want {
				t.Errorf("%d look-ups of %q in 20 minutes, want %d", got, names, want)
			}
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
}
