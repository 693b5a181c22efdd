package certs_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"derpd/certs"
	"derpd/internal/testkit"
	"derpd/internal/testkit/acmetest"
)

// listeners are the listeners of a relay without a certificate.
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
	t.Cleanup(func() {
		for _, s := range servers {
			_ = s.Close()
		}
	})
	runManager(t, m)
}

func waitReady(t *testing.T, m certs.Manager) {
	t.Helper()
	testkit.Wait(t, "a certificate", func(context.Context) error {
		select {
		case <-m.Ready():
			return nil
		default:
			return errors.Join(errors.New("not ready"), m.Status().Err)
		}
	})
}

func TestACMEObtains(t *testing.T) {
	for _, tt := range []struct {
		name      string
		names     []string
		http, tls bool
	}{
		{"HTTP-01", []string{"derp.example.com"}, true, false},
		{"TLS-ALPN-01", []string{"derp.example.com"}, false, true},
		{"an address", []string{"127.0.0.1"}, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			authority := acmetest.Start(t)
			l := listen(t)
			authority.Validate(t, portOf(l.http), portOf(l.https))
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
			dialer := &tls.Dialer{NetDialer: &net.Dialer{Timeout: 30 * time.Second}, Config: &tls.Config{ServerName: tt.names[0], RootCAs: authority.Roots(), MinVersion: tls.VersionTLS12}}
			conn, err := dialer.DialContext(t.Context(), "tcp", l.https.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			_ = conn.Close()
		})
	}
}

// A restart does not need the authority, which may be down or rate-limited.
func TestACMERestartUsesStoredCertificate(t *testing.T) {
	authority := acmetest.Start(t)
	l := listen(t)
	authority.Validate(t, portOf(l.http), portOf(l.https))
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
	c.Roots = x509.NewCertPool() // no connection to the authority succeeds
	m := certs.NewACME(c)
	serveChallenges(t, m, listen(t))
	waitReady(t, m)
	if !slices.Equal(first, m.Status().Leaf.Raw) {
		t.Error("the restart did not use the stored certificate")
	}
}

// A damaged certificate or account is replaced.
func TestACMEDamagedStorage(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(file func(pattern string) string) error
	}{
		{"half a certificate", func(file func(string) string) error {
			return os.Truncate(file("certificates/*/*/*.pem"), 300)
		}},
		{"a certificate without its key", func(file func(string) string) error {
			path := file("certificates/*/*/*.pem")
			data, err := os.ReadFile(path)
			certificate, _ := pem.Decode(data)
			return errors.Join(err, os.WriteFile(path, pem.EncodeToMemory(certificate), 0o600))
		}},
		{"an account without its key", func(file func(string) string) error {
			return errors.Join(os.Remove(file("certificates/*/*/*.pem")), os.Remove(file("acme/*/users/*/*.key")))
		}},
		{"the directory of an account alone", func(file func(string) string) error {
			return errors.Join(os.Remove(file("certificates/*/*/*.pem")), os.Remove(file("acme/*/users/*/*.key")), os.Remove(file("acme/*/users/*/*.json")))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			authority := acmetest.Start(t)
			l := listen(t)
			authority.Validate(t, portOf(l.http), portOf(l.https))
			c := certs.ACMEConfig{
				Names: []string{"derp.example.com"}, Directory: authority.Directory, Roots: authority.ServerRoots,
				ListenHost: "127.0.0.1", HTTPPort: portOf(l.http), Dir: t.TempDir(), Log: zerolog.Nop(),
			}
			if c.Stored() {
				t.Error("Stored is true for an empty directory")
			}
			var first []byte
			t.Run("obtain", func(t *testing.T) {
				m := certs.NewACME(c)
				serveChallenges(t, m, l)
				waitReady(t, m)
				first = m.Status().Leaf.Raw
			})
			if !c.Stored() {
				t.Error("Stored is false for a stored certificate")
			}
			err := tt.spoil(func(pattern string) string {
				found, _ := filepath.Glob(filepath.Join(c.Dir, pattern))
				if len(found) != 1 {
					t.Fatalf("%s: %v, want one", pattern, found)
				}
				return found[0]
			})
			if err != nil {
				t.Fatal(err)
			}
			if c.Stored() {
				t.Error("Stored is true for a damaged directory")
			}
			again := listenOn(t, l.https.Addr().String(), l.http.Addr().String())
			m := certs.NewACME(c)
			serveChallenges(t, m, again)
			waitReady(t, m)
			if slices.Equal(first, m.Status().Leaf.Raw) {
				t.Error("the damaged certificate is served")
			}
		})
	}
}

// A failure is in the status and once in the log, with the authority's message and
// the likely cause.
func TestACMERefused(t *testing.T) {
	for _, tt := range []struct {
		name   string
		config func(t *testing.T, authority *acmetest.CA, c *certs.ACMEConfig, l listeners)
		want   []string
	}{
		{"the port is closed", func(t *testing.T, authority *acmetest.CA, _ *certs.ACMEConfig, l listeners) {
			t.Helper()
			closed := listen(t)
			_ = closed.http.Close()
			authority.Validate(t, portOf(closed.http), portOf(l.https))
		}, []string{"derp.example.com: the authority says", "(connection): the authority could not connect; open TCP 80"}},
		{"another server answers", func(t *testing.T, authority *acmetest.CA, _ *certs.ACMEConfig, l listeners) {
			t.Helper()
			other := httptest.NewServer(http.NotFoundHandler())
			t.Cleanup(other.Close)
			authority.Validate(t, portOf(other.Listener), portOf(l.https))
		}, []string{"(unauthorized): another server answered; check that DNS points to this machine"}},
		{"no account binding", func(t *testing.T, authority *acmetest.CA, _ *certs.ACMEConfig, l listeners) {
			t.Helper()
			authority.ExternalAccounts = map[string]string{"kid-1": macKey}
			authority.Validate(t, portOf(l.http), portOf(l.https))
		}, []string{"set DERP_ACME_EAB_KID and DERP_ACME_EAB_KEY"}},
		{"a wrong account binding", func(t *testing.T, authority *acmetest.CA, c *certs.ACMEConfig, l listeners) {
			t.Helper()
			authority.ExternalAccounts = map[string]string{"kid-1": macKey}
			c.EABKeyID, c.EABKey = "kid-1", strings.Repeat("REVG", 11)
			authority.Validate(t, portOf(l.http), portOf(l.https))
		}, []string{"the authority refuses this account; check DERP_ACME_EAB_KID and DERP_ACME_EAB_KEY"}},
		{"the authority is down", func(_ *testing.T, _ *acmetest.CA, c *certs.ACMEConfig, _ listeners) {
			c.Directory = "https://127.0.0.1:1/dir"
		}, []string{"the authority cannot be reached from here: dial tcp 127.0.0.1:1: connect: connection refused"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			authority := acmetest.Start(t)
			l := listen(t)
			var log testkit.Buffer
			c := certs.ACMEConfig{
				Names: []string{"derp.example.com"}, Directory: authority.Directory, Roots: authority.ServerRoots,
				ListenHost: "127.0.0.1", HTTPPort: portOf(l.http), Dir: t.TempDir(), Log: zerolog.New(&log).Level(zerolog.InfoLevel),
			}
			tt.config(t, authority, &c, l)
			m := certs.NewACME(c)
			serveChallenges(t, m, l)
			testkit.Until(t, "a failure is reported", func() bool { return !errors.Is(m.Status().Err, certs.ErrNone) })
			said := m.Status().Err.Error()
			for _, want := range tt.want {
				if !strings.Contains(said, want) {
					t.Errorf("the status is %q, want %q in it", said, want)
				}
			}
			if n := strings.Count(log.String(), `"message":"certificate not obtained"`); n != 1 {
				t.Errorf("logged %d times, want once:\n%s", n, log.String())
			}
		})
	}
}

// macKey is 33 bytes, base64url.
var macKey = strings.Repeat("QUJD", 11)

func TestACMEExternalAccount(t *testing.T) {
	authority := acmetest.Start(t)
	authority.ExternalAccounts = map[string]string{"kid-1": macKey}
	l := listen(t)
	authority.Validate(t, portOf(l.http), portOf(l.https))
	m := certs.NewACME(certs.ACMEConfig{
		Names: []string{"derp.example.com"}, Directory: authority.Directory, Roots: authority.ServerRoots, EABKeyID: "kid-1", EABKey: macKey,
		ListenHost: "127.0.0.1", HTTPPort: portOf(l.http), Dir: t.TempDir(), Log: zerolog.Nop(),
	})
	serveChallenges(t, m, l)
	waitReady(t, m)
}

// An authority that never answers does not delay the stop, because a container
// manager would kill the relay.
func TestACMEStopsWhileTheAuthorityHangs(t *testing.T) {
	authority := acmetest.Start(t)
	l := listen(t)
	m := certs.NewACME(certs.ACMEConfig{
		Names: []string{"derp.example.com"}, Directory: authority.Directory, Roots: authority.ServerRoots,
		ListenHost: "127.0.0.1", HTTPPort: portOf(l.http), Dir: t.TempDir(), Log: zerolog.Nop(),
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	<-authority.Asked
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("Run waits for the authority")
	}
}
