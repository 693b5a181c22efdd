package certs_test

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"derpd/certs"
	"derpd/internal/testkit"
	"derpd/internal/testkit/acmetest"
)

// The manager retries an authority that is unreachable at the start, because a
// machine that has just booted may have no network yet.
func TestACMEAuthorityComesUpLater(t *testing.T) {
	authority := acmetest.Start(t)
	l := listen(t)
	authority.Validate(t, portOf(l.http), portOf(l.https))
	authority.Stop()
	var log testkit.Buffer
	m := certs.NewACME(certs.ACMEConfig{
		Names: []string{"derp.example.com", "relay.example.net"}, Directory: authority.Directory, Roots: authority.ServerRoots,
		ListenHost: "127.0.0.1", HTTPPort: portOf(l.http), Dir: t.TempDir(), Log: zerolog.New(&log).Level(zerolog.InfoLevel),
	})
	serveChallenges(t, m, l)
	s := served{Manager: m}
	s.until(t, "no authority", func(st certs.Status) bool {
		return st.ReloadErrors >= 4 && strings.Contains(st.Err.Error(), "derp.example.com: the authority cannot be reached from here: dial tcp") &&
			strings.Contains(st.Err.Error(), "connection refused; check the network and DNS of this machine; derpd tries again by itself")
	})
	select {
	case <-m.Ready():
		t.Fatal("ready without a certificate")
	default:
	}
	if n := strings.Count(log.String(), "certificate not obtained"); n != 2 {
		t.Errorf("logged %d times, want once for each name:\n%s", n, log.String())
	}
	authority.Resume(t)
	waitReady(t, m)
	s.until(t, "the certificate replaces the error", func(st certs.Status) bool { return st.Leaf != nil && st.Err == nil })
}

// The operator reads until when the authority's rate limit applies.
func TestACMERateLimited(t *testing.T) {
	authority := acmetest.Start(t)
	l := listen(t)
	authority.Validate(t, portOf(l.http), portOf(l.https))
	refuse := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/problem+json")
		w.Header().Set("Retry-After", "3600")
		w.WriteHeader(http.StatusTooManyRequests)
		_, _ = fmt.Fprint(w, `{"type":"urn:ietf:params:acme:error:rateLimited","status":429,"detail":"too many certificates (5) already issued for this exact set of identifiers in the last 168h0m0s, retry after 2026-12-01 12:00:00 UTC"}`)
	})
	authority.Refuse.Store(&refuse)
	var log testkit.Buffer
	m := certs.NewACME(certs.ACMEConfig{
		Names: []string{"derp.example.com"}, Directory: authority.Directory, Roots: authority.ServerRoots,
		ListenHost: "127.0.0.1", HTTPPort: portOf(l.http), Dir: t.TempDir(), Log: zerolog.New(&log).Level(zerolog.InfoLevel),
	})
	serveChallenges(t, m, l)
	s := served{Manager: m}
	const want = `derp.example.com: the authority says "too many certificates (5) already issued for this exact set of identifiers in the last 168h0m0s, retry after 2026-12-01 12:00:00 UTC" (rateLimited): wait until the time in the message`
	s.until(t, "refused", func(st certs.Status) bool { return strings.HasPrefix(st.Err.Error(), want) })
	if n := strings.Count(log.String(), "certificate not obtained"); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, log.String())
	}
}

// Refused nonces are retried: an authority refuses them after its restart, or when
// several servers share its name.
func TestACMEBadNonces(t *testing.T) {
	authority := acmetest.Start(t)
	authority.RejectNonces = 50
	l := listen(t)
	authority.Validate(t, portOf(l.http), portOf(l.https))
	m := certs.NewACME(certs.ACMEConfig{
		Names: []string{"derp.example.com"}, Directory: authority.Directory, Roots: authority.ServerRoots,
		ListenHost: "127.0.0.1", HTTPPort: portOf(l.http), Dir: t.TempDir(), Log: zerolog.Nop(),
	})
	serveChallenges(t, m, l)
	select {
	case <-m.Ready():
	case <-time.After(2 * time.Minute): // ten refusals in a row cost a minute
		t.Fatalf("no certificate: %v", m.Status().Err)
	}
}

// When the authority does not find the relay, the operator reads the addresses in
// DNS.
func TestACMEFailureNamesAddresses(t *testing.T) {
	for _, tt := range []struct {
		name  string
		found []netip.Addr
		err   error
		want  string
	}{
		{"elsewhere", []netip.Addr{netip.MustParseAddr("2001:db8::9"), netip.MustParseAddr("::ffff:198.51.100.9")}, nil, "; DNS has 198.51.100.9 and 2001:db8::9 for dns.example.com"},
		{"nowhere", nil, &net.DNSError{IsNotFound: true}, "; DNS has no address for dns.example.com"},
		{"no answer", nil, context.DeadlineExceeded, "and that no proxy is in front of it"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			authority := acmetest.Start(t)
			l := listen(t)
			authority.Validate(t, portOf(l.http), portOf(l.https))
			var asked sync.Map
			m := certs.NewACME(certs.ACMEConfig{
				Names: []string{"dns.example.com"}, Directory: authority.Directory, Roots: authority.ServerRoots,
				ListenHost: "127.0.0.1", HTTPPort: portOf(l.http), Dir: t.TempDir(), Log: zerolog.Nop(),
				Lookup: func(_ context.Context, network, host string) ([]netip.Addr, error) {
					asked.Store(network+" "+host, true)
					return tt.found, tt.err
				},
			})
			// Another server has the port.
			go func() {
				_ = (&http.Server{Handler: http.NotFoundHandler(), ReadHeaderTimeout: time.Minute}).Serve(l.http)
			}()
			runManager(t, m)
			served{Manager: m}.until(t, "refused", func(st certs.Status) bool { return strings.HasSuffix(st.Err.Error(), tt.want) })
			if _, ok := asked.Load("ip dns.example.com"); !ok {
				t.Error("DNS was not asked for the name")
			}
		})
	}
}
