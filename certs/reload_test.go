package certs_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"derpd/certs"
)

// served runs a manager behind a TLS listener.
type served struct {
	certs.Manager
	addr  string
	roots *x509.CertPool
}

// runManager runs m until the end of the test.
func runManager(t *testing.T, m certs.Manager) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(30 * time.Second):
			t.Error("Run does not end")
		}
	})
}

func serve(t *testing.T, m certs.Manager, roots *x509.CertPool) served {
	t.Helper()
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	secure := tls.NewListener(ln, &tls.Config{GetCertificate: m.GetCertificate, MinVersion: tls.VersionTLS12})
	go func() {
		for {
			conn, err := secure.Accept()
			if err != nil {
				return
			}
			go func() {
				_ = conn.(*tls.Conn).HandshakeContext(context.Background())
				_ = conn.Close()
			}()
		}
	}()
	t.Cleanup(func() { _ = ln.Close() })
	runManager(t, m)
	return served{m, ln.Addr().String(), roots}
}

// leaf is the certificate that a client is shown and verifies.
func (s served) leaf(t *testing.T) *x509.Certificate {
	t.Helper()
	dialer := &tls.Dialer{Config: &tls.Config{ServerName: "derp.example.com", RootCAs: s.roots, MinVersion: tls.VersionTLS12}}
	conn, err := dialer.DialContext(t.Context(), "tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0]
}

// until waits until the status satisfies the condition.
func (s served) until(t *testing.T, what string, condition func(certs.Status) bool) {
	t.Helper()
	deadline, tick := time.After(30*time.Second), time.NewTicker(10*time.Millisecond)
	defer tick.Stop()
	for !condition(s.Status()) {
		select {
		case <-deadline:
			t.Fatalf("%s: %+v", what, s.Status())
		case <-tick.C:
		}
	}
}

// Files are replaced while clients connect: good ones are taken, and with bad
// ones clients go on seeing the old certificate while the status tells.
func TestManualReplacedWhileServing(t *testing.T) {
	soon, later := now.Add(-time.Hour), now.Add(90*24*time.Hour)
	root := issue(t, "Test Root", true, soon, later, nil)
	middle := issue(t, "Test Intermediate", true, soon, later, root)
	leaf := func(notAfter time.Time) *tls.Certificate {
		return issue(t, "derp.example.com", false, soon.Add(-time.Hour), notAfter, middle)
	}
	first, second, third := leaf(later), leaf(later.Add(time.Hour)), leaf(later.Add(2*time.Hour))
	roots := x509.NewCertPool()
	roots.AddCert(root.Leaf)

	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	write := func(cert, key *tls.Certificate, issuers ...*tls.Certificate) {
		t.Helper()
		writeChain(t, certFile, append([]*tls.Certificate{cert}, issuers...)...)
		writeKey(t, keyFile, key)
	}
	write(first, first, middle)
	m, err := certs.LoadManual(certs.ManualConfig{CertFile: certFile, KeyFile: keyFile, Names: []string{"derp.example.com"}, Roots: roots, Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, m, roots)
	seen := func(want *tls.Certificate) {
		t.Helper()
		if !s.leaf(t).Equal(want.Leaf) {
			t.Error("clients see another certificate than they should")
		}
	}
	seen(first)

	write(second, second, middle)
	s.until(t, "good files", func(st certs.Status) bool { return st.Leaf.Equal(second.Leaf) && st.Err == nil })
	seen(second)

	for _, bad := range []struct {
		name  string
		write func()
		want  string
	}{
		{"wrong pair", func() { write(third, first, middle) }, "private key does not match public key"},
		{"expired", func() { old := leaf(soon); write(old, old, middle) }, "expired on"},
		{"missing issuer", func() { write(third, third) }, `the certificate of "CN=Test Intermediate" is missing`},
		{"half-written", func() {
			write(third, third, middle)
			if err := os.Truncate(certFile, 200); err != nil {
				t.Fatal(err)
			}
		}, "loading "},
		{"gone", func() {
			if err := os.Remove(keyFile); err != nil {
				t.Fatal(err)
			}
		}, "no such file or directory"},
	} {
		bad.write()
		s.until(t, bad.name, func(st certs.Status) bool { return st.Err != nil && strings.Contains(st.Err.Error(), bad.want) })
		seen(second)
	}

	write(third, third, middle)
	s.until(t, "good files again", func(st certs.Status) bool { return st.Leaf.Equal(third.Leaf) && st.Err == nil })
	seen(third)
}

// Kubernetes swaps a link to a directory, certbot swaps a link to each file,
// acme.sh and lego write in place or rename.
func TestManualLayouts(t *testing.T) {
	soon, later := now.Add(-time.Hour), now.Add(90*24*time.Hour)
	first := issue(t, "derp.example.com", false, soon, later, nil)
	second := issue(t, "derp.example.com", false, soon, later.Add(time.Hour), nil)
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// relink points a link somewhere else in one step.
	relink := func(t *testing.T, target, link string) {
		t.Helper()
		must(t, os.Symlink(target, link+".new"))
		must(t, os.Rename(link+".new", link))
	}
	for name, layout := range map[string]func(t *testing.T, dir, version string, c *tls.Certificate){
		"in place": func(t *testing.T, dir, _ string, c *tls.Certificate) {
			t.Helper()
			writeChain(t, filepath.Join(dir, "tls.crt"), c)
			writeKey(t, filepath.Join(dir, "tls.key"), c)
		},
		"renamed": func(t *testing.T, dir, version string, c *tls.Certificate) {
			t.Helper()
			writeChain(t, filepath.Join(dir, version), c)
			must(t, os.Rename(filepath.Join(dir, version), filepath.Join(dir, "tls.crt")))
			writeKey(t, filepath.Join(dir, version), c)
			must(t, os.Rename(filepath.Join(dir, version), filepath.Join(dir, "tls.key")))
		},
		"Kubernetes": func(t *testing.T, dir, version string, c *tls.Certificate) {
			t.Helper()
			must(t, os.Mkdir(filepath.Join(dir, ".."+version), 0o700))
			writeChain(t, filepath.Join(dir, ".."+version, "tls.crt"), c)
			writeKey(t, filepath.Join(dir, ".."+version, "tls.key"), c)
			relink(t, ".."+version, filepath.Join(dir, "..data"))
			for _, file := range []string{"tls.crt", "tls.key"} {
				if err := os.Symlink(filepath.Join("..data", file), filepath.Join(dir, file)); err != nil && !os.IsExist(err) {
					t.Fatal(err)
				}
			}
		},
		"certbot": func(t *testing.T, dir, version string, c *tls.Certificate) {
			t.Helper()
			archive := t.TempDir()
			writeChain(t, filepath.Join(archive, version+".crt"), c)
			writeKey(t, filepath.Join(archive, version+".key"), c)
			relink(t, filepath.Join(archive, version+".crt"), filepath.Join(dir, "tls.crt"))
			relink(t, filepath.Join(archive, version+".key"), filepath.Join(dir, "tls.key"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			layout(t, dir, "1", first)
			m, err := certs.LoadManual(certs.ManualConfig{CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key"), Names: []string{"derp.example.com"}, Log: zerolog.Nop()})
			if err != nil {
				t.Fatal(err)
			}
			s := serve(t, m, nil)
			layout(t, dir, "2", second)
			s.until(t, name, func(st certs.Status) bool { return st.Leaf.Equal(second.Leaf) && st.Err == nil })
		})
	}
}

// A rotated pinned certificate is taken by the relay that runs.
func TestPinnedRotatedWhileServing(t *testing.T) {
	c := certs.PinnedConfig{Path: filepath.Join(t.TempDir(), "pinned.pem"), Names: []string{"derp.example.com"}, Log: zerolog.Nop()}
	m, err := certs.LoadOrCreatePinned(c)
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, m, nil)
	old := s.Status().Pin
	if err := certs.RotatePinned(c, now); err != nil {
		t.Fatal(err)
	}
	s.until(t, "rotated", func(st certs.Status) bool { return st.Pin != old && st.Err == nil })
}
