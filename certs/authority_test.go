package certs

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/rs/zerolog"

	"derpd/internal/testkit"
)

// DNS-01 is used first, and the listeners' challenges after it. DNS-01 cannot prove
// an address.
func TestIssuers(t *testing.T) {
	type challenges struct{ dns, http, tls bool }
	for _, tt := range []struct {
		name      string
		dns       *DNSConfig
		http, tls int
		profile   string
		want      []challenges
	}{
		{"both listeners", nil, 80, 443, "", []challenges{{false, true, true}}},
		{"HTTP-01", nil, 80, 0, "", []challenges{{false, true, false}}},
		{"TLS-ALPN-01", nil, 0, 443, "", []challenges{{false, false, true}}},
		{"DNS-01", &DNSConfig{}, 0, 0, "", []challenges{{true, false, false}}},
		{"DNS-01, then HTTP-01", &DNSConfig{}, 80, 0, "", []challenges{{true, true, false}, {false, true, false}}},
		{"DNS-01, then TLS-ALPN-01", &DNSConfig{}, 0, 443, "", []challenges{{true, false, true}, {false, false, true}}},
		{"an address", &DNSConfig{}, 80, 443, shortlived, []challenges{{false, true, true}}},
	} {
		a := NewACME(ACMEConfig{
			Directory: "https://ca.example.com/dir", Email: "ops@example.com", EABKeyID: "id", EABKey: "key",
			ListenHost: "192.0.2.1", HTTPPort: tt.http, TLSPort: tt.tls, DNS: tt.dns, Log: zerolog.Nop(),
		})
		var got []challenges
		for _, i := range a.issuers(tt.profile) {
			got = append(got, challenges{i.DNS01Solver != nil, !i.DisableHTTPChallenge, !i.DisableTLSALPNChallenge})
			if i.CA != "https://ca.example.com/dir" || i.Email != "ops@example.com" || !i.Agreed || i.Profile != tt.profile ||
				i.ListenHost != "192.0.2.1" || i.AltHTTPPort != tt.http || i.AltTLSALPNPort != tt.tls ||
				i.ExternalAccount.KeyID != "id" || i.ExternalAccount.MACKey != "key" || !i.DisableDistributedSolvers {
				t.Errorf("%s: %+v", tt.name, i)
			}
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
	if i := NewACME(ACMEConfig{Log: zerolog.Nop()}).issuers("")[0]; i.ExternalAccount != nil {
		t.Error("an account binding without a key")
	}
}

func TestACMEDefaults(t *testing.T) {
	a := NewACME(ACMEConfig{Names: []string{"derp.example.com"}, Log: zerolog.Nop()})
	if a.config.CheckEvery != time.Minute || a.config.Lookup == nil {
		t.Errorf("%+v, want a check every minute and the system's resolver", a.config)
	}
	if cert, err := a.GetCertificate(&tls.ClientHelloInfo{ServerName: "derp.example.com"}); cert != nil || !errors.Is(err, ErrNone) {
		t.Errorf("before Run: %v, %v; want no certificate", cert, err)
	}
	next := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })
	for _, path := range []string{"/generate_204", "/.well-known/acme-challenge/x"} {
		w := httptest.NewRecorder()
		a.HTTPHandler(next).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, http.NoBody))
		if w.Code != http.StatusTeapot {
			t.Errorf("%s before Run: %d, want that of the next handler", path, w.Code)
		}
	}
}

// Every certificate comes from the configured authority, and from no default of
// certmagic's.
func TestACMEUsesItsAuthorityAlone(t *testing.T) {
	const directory = "https://127.0.0.1:1/directory"
	a := NewACME(ACMEConfig{Names: []string{"derp.example.com"}, Directory: directory, HTTPPort: 80, Dir: t.TempDir(), Log: zerolog.Nop()})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	testkit.Until(t, "the manager runs", func() bool { return a.state.Load() != nil })
	issuers := a.state.Load().config.Issuers
	if len(issuers) != 1 {
		t.Errorf("%d issuers, want 1", len(issuers))
	}
	for _, issuer := range issuers {
		if got, ok := issuer.(*certmagic.ACMEIssuer); !ok || got.CA != directory {
			t.Errorf("an issuer asks %+v, want %s", issuer, directory)
		}
	}
	cancel()
	if err := testkit.Receive(t, "the end of Run", ended); err != nil {
		t.Error(err)
	}
}

// reach fails when the authority's server is not trusted, or the context ends.
func TestReach(t *testing.T) {
	paths := make(chan string, 1)
	authority := httptest.NewTLSServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { paths <- r.URL.Path }))
	t.Cleanup(authority.Close)
	c := ACMEConfig{Directory: authority.URL + "/dir", Log: zerolog.Nop()}
	untrusted := NewACME(c).reach(t.Context())
	if _, ok := errors.AsType[*tls.CertificateVerificationError](untrusted); !ok {
		t.Errorf("without its root: %v, want a verification error", untrusted)
	}
	c.Roots = authority.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	if err := NewACME(c).reach(t.Context()); err != nil {
		t.Error(err)
	}
	if path := <-paths; path != "/dir" {
		t.Errorf("asked for %s, want the directory", path)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := NewACME(c).reach(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the end of the context", err)
	}
}

// at is a connection that arrived at an address.
type at struct {
	net.Conn
	addr string
}

func (c at) LocalAddr() net.Addr { a, _ := net.ResolveTCPAddr("tcp", c.addr); return a }

// Without SNI, the dialled address comes first, then its family, then other
// addresses. The order of the configuration decides among equals.
func TestWithoutSNI(t *testing.T) {
	names := []string{"derp.example.com", "2001:db8::1", "192.0.2.1", "192.0.2.2", "2001:db8::2"}
	for _, tt := range []struct {
		conn net.Conn
		want []string
	}{
		{at{addr: "192.0.2.2:443"}, []string{"192.0.2.2", "192.0.2.1", "2001:db8::1", "2001:db8::2", "derp.example.com"}},
		{at{addr: "[::ffff:192.0.2.2]:443"}, []string{"192.0.2.2", "192.0.2.1", "2001:db8::1", "2001:db8::2", "derp.example.com"}},
		{at{addr: "10.0.0.2:443"}, []string{"192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2", "derp.example.com"}},
		{at{addr: "[2001:db8::2%lo]:443"}, []string{"2001:db8::2", "2001:db8::1", "192.0.2.1", "192.0.2.2", "derp.example.com"}},
		{at{addr: "[fe80::1]:443"}, []string{"2001:db8::1", "2001:db8::2", "192.0.2.1", "192.0.2.2", "derp.example.com"}},
	} {
		if got := withoutSNI(names, tt.conn); !slices.Equal(got, tt.want) {
			t.Errorf("%v: %q, want %q", tt.conn, got, tt.want)
		}
	}
	if got := withoutSNI(names[:1], nil); !slices.Equal(got, names[:1]) {
		t.Errorf("without connection: %q", got)
	}
}
