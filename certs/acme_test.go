package certs_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"derpd/certs"
	"derpd/certs/acmetest"
)

// listeners are where a relay would listen, before it has a certificate.
type listeners struct{ https, http net.Listener }

func listen(t *testing.T) listeners {
	t.Helper()
	var l listeners
	for _, ln := range []*net.Listener{&l.https, &l.http} {
		var err error
		if *ln, err = new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = (*ln).Close() })
	}
	return l
}

func portOf(ln net.Listener) int { return ln.Addr().(*net.TCPAddr).Port }

// serveChallenges runs the manager behind real listeners, as cmd/derpd does.
func serveChallenges(t *testing.T, m *certs.ACME, l listeners) {
	t.Helper()
	config := &tls.Config{GetCertificate: m.GetCertificate, NextProtos: []string{"http/1.1", "acme-tls/1"}, MinVersion: tls.VersionTLS12}
	servers := []*http.Server{
		{Handler: http.NotFoundHandler(), ReadHeaderTimeout: time.Minute},
		{Handler: m.HTTPHandler(http.NotFoundHandler()), ReadHeaderTimeout: time.Minute},
	}
	go func() { _ = servers[0].Serve(tls.NewListener(l.https, config)) }()
	go func() { _ = servers[1].Serve(l.http) }()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		for _, s := range servers {
			_ = s.Close()
		}
	})
}

func waitReady(t *testing.T, m certs.Manager) {
	t.Helper()
	select {
	case <-m.Ready():
	case <-time.After(30 * time.Second):
		t.Fatalf("no certificate: %v", m.Status().Err)
	}
}

func TestACMEObtains(t *testing.T) {
	for _, tt := range []struct {
		name      string
		names     []string
		http, tls bool
	}{
		{"HTTP-01", []string{"derp.example.com"}, true, false},
		{"TLS-ALPN-01", []string{"derp.example.com"}, false, true},
		{"several names", []string{"derp.example.com", "relay.example.net"}, true, true},
		{"an address", []string{"127.0.0.1"}, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			authority := acmetest.Start(t)
			l := listen(t)
			authority.Validate(portOf(l.http), portOf(l.https))
			c := certs.ACMEConfig{
				Names: tt.names, Directory: authority.Directory, Roots: authority.ServerRoots,
				ListenHost: "127.0.0.1", Dir: t.TempDir(), Log: zerolog.Nop(),
			}
			if tt.http {
				c.HTTPPort = portOf(l.http)
			}
			if tt.tls {
				c.TLSPort = portOf(l.https)
			}
			m := certs.NewACME(c)
			if got := m.Status(); got.Leaf != nil || got.Err == nil {
				t.Errorf("before Run: %+v, want no certificate and an error", got)
			}
			serveChallenges(t, m, l)
			waitReady(t, m)

			leaf := m.Status().Leaf
			if leaf == nil {
				t.Fatalf("ready, but without a certificate: %v", m.Status().Err)
			}
			if err := leaf.VerifyHostname(tt.names[0]); err != nil {
				t.Error(err)
			}
			if leaf.PublicKeyAlgorithm != x509.ECDSA {
				t.Errorf("key is %s, want ECDSA: RSA doubles the cost of a connect", leaf.PublicKeyAlgorithm)
			}

			// A client that dials an address sends no SNI.
			dialer := &tls.Dialer{Config: &tls.Config{ServerName: tt.names[0], RootCAs: authority.Roots(), MinVersion: tls.VersionTLS12}}
			conn, err := dialer.DialContext(t.Context(), "tcp", l.https.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			_ = conn.Close()
		})
	}
}

// A restart must not ask the authority: it may be down, or out of patience.
func TestACMERestartUsesStoredCertificate(t *testing.T) {
	authority := acmetest.Start(t)
	l := listen(t)
	authority.Validate(portOf(l.http), portOf(l.https))
	c := certs.ACMEConfig{
		Names: []string{"derp.example.com"}, Directory: authority.Directory, Roots: authority.ServerRoots,
		ListenHost: "127.0.0.1", HTTPPort: portOf(l.http), Dir: t.TempDir(), Log: zerolog.Nop(),
	}
	var first []byte
	t.Run("obtain", func(t *testing.T) {
		m := certs.NewACME(c)
		serveChallenges(t, m, l)
		waitReady(t, m)
		first = m.Status().Leaf.Raw
	})
	c.Roots = x509.NewCertPool() // the authority cannot be talked to
	m := certs.NewACME(c)
	serveChallenges(t, m, listen(t))
	waitReady(t, m)
	if !slices.Equal(first, m.Status().Leaf.Raw) {
		t.Error("the restart did not use the stored certificate")
	}
}
