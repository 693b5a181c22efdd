package certs_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"derpd/certs"
	"derpd/internal/testkit"
)

// served is a manager that runs, and the authorities that its clients trust.
type served struct {
	certs.Manager
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

// serve runs a manager in a bubble. The clock of the bubble begins at now.
func serve(t *testing.T, m certs.Manager, roots *x509.CertPool) served {
	t.Helper()
	runManager(t, m)
	return served{m, roots}
}

// setClock sets the clock of a bubble to now: certificates are valid then.
func setClock() { <-time.After(time.Until(now)) }

// leaf returns the certificate that a client gets and verifies.
func (s served) leaf(t *testing.T) *x509.Certificate {
	t.Helper()
	there, here := net.Pipe()
	server := tls.Server(there, &tls.Config{GetCertificate: s.GetCertificate, MinVersion: tls.VersionTLS12})
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.HandshakeContext(t.Context())
		_, _ = io.Copy(io.Discard, server)
	}()
	client := tls.Client(here, &tls.Config{ServerName: "derp.example.com", RootCAs: s.roots, MinVersion: tls.VersionTLS12})
	err := client.HandshakeContext(t.Context())
	_ = here.Close()
	<-done
	if err != nil {
		t.Fatal(err)
	}
	return client.ConnectionState().PeerCertificates[0]
}

// until waits until the status satisfies the condition.
func (s served) until(t *testing.T, what string, condition func(certs.Status) bool) {
	t.Helper()
	testkit.Wait(t, what, func(context.Context) error {
		if status := s.Status(); !condition(status) {
			return fmt.Errorf("the status is %+v", status)
		}
		return nil
	})
}

// layout is the way in which a program stores and replaces certificate and key.
type layout struct {
	name, certFile, keyFile string
	publish                 func(t *testing.T, dir, version string, cert, key []byte)
}

var layouts = []layout{
	{
		"acme.sh", "fullchain.cer", "derp.example.com.key",
		func(t *testing.T, dir, _ string, cert, key []byte) {
			t.Helper()
			// --install-cert writes into the files, the key first.
			write(t, filepath.Join(dir, "derp.example.com.key"), key)
			write(t, filepath.Join(dir, "fullchain.cer"), cert)
		},
	},
	{
		"lego", "derp.example.com.crt", "derp.example.com.key",
		func(t *testing.T, dir, _ string, cert, key []byte) {
			t.Helper()
			write(t, filepath.Join(dir, "derp.example.com.crt"), cert)
			write(t, filepath.Join(dir, "derp.example.com.key"), key)
		},
	},
	{
		"renamed", "tls.crt", "tls.key",
		func(t *testing.T, dir, version string, cert, key []byte) {
			t.Helper()
			for name, data := range map[string][]byte{"tls.crt": cert, "tls.key": key} {
				write(t, filepath.Join(dir, version), data)
				rename(t, filepath.Join(dir, version), filepath.Join(dir, name))
			}
		},
	},
	{
		"Kubernetes", "tls.crt", "tls.key",
		func(t *testing.T, dir, version string, cert, key []byte) {
			t.Helper()
			// One link to a directory is replaced; the files are links into it.
			makeDir(t, filepath.Join(dir, ".."+version))
			write(t, filepath.Join(dir, ".."+version, "tls.crt"), cert)
			write(t, filepath.Join(dir, ".."+version, "tls.key"), key)
			link(t, ".."+version, filepath.Join(dir, "..data.new"))
			rename(t, filepath.Join(dir, "..data.new"), filepath.Join(dir, "..data"))
			for _, name := range []string{"tls.crt", "tls.key"} {
				_ = os.Remove(filepath.Join(dir, name))
				link(t, filepath.Join("..data", name), filepath.Join(dir, name))
			}
		},
	},
	{
		"certbot", "live/derp.example.com/fullchain.pem", "live/derp.example.com/privkey.pem",
		func(t *testing.T, dir, version string, cert, key []byte) {
			t.Helper()
			makeDir(t, filepath.Join(dir, "live/derp.example.com"))
			makeDir(t, filepath.Join(dir, "archive/derp.example.com"))
			// The link to each file is removed and made again.
			for name, data := range map[string][]byte{"privkey": key, "fullchain": cert} {
				write(t, filepath.Join(dir, "archive/derp.example.com", name+version+".pem"), data)
				live := filepath.Join(dir, "live/derp.example.com", name+".pem")
				_ = os.Remove(live)
				link(t, "../../archive/derp.example.com/"+name+version+".pem", live)
			}
		},
	},
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func link(t *testing.T, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

func makeDir(t *testing.T, path string) {
	t.Helper()
	if err := os.MkdirAll(path, 0o700); err != nil {
		t.Fatal(err)
	}
}

// Files are replaced while clients connect, in the way of each program. Clients get
// the new certificate if it is valid. If not, they get the old one, and the status
// has the error.
func TestManualReplacedWhileServing(t *testing.T) {
	soon, later := now.Add(-time.Hour), now.Add(90*24*time.Hour)
	root := issue(t, "Test Root", true, soon, later, nil)
	middle := issue(t, "Test Intermediate", true, soon, later, root)
	leaf := func(notAfter time.Time) *tls.Certificate {
		return testkit.NewCertificate(t, testkit.Certificate{
			Names: []string{"derp.example.com"}, NotBefore: soon.Add(-time.Hour), NotAfter: notAfter, Issuer: middle, Change: withURL(issuerURL),
		})
	}
	first, second, expired := leaf(later), leaf(later.Add(time.Hour)), leaf(soon)
	roots := x509.NewCertPool()
	roots.AddCert(root.Leaf)
	faults := []struct {
		name      string
		cert, key []byte
		want      string
	}{
		{"wrong pair", chainPEM(t, second, middle), keyPEM(t, first), "does not belong to"},
		{"expired", chainPEM(t, expired, middle), keyPEM(t, expired), "expired on"},
		{"missing issuer", chainPEM(t, second), keyPEM(t, second), `the certificate of "CN=Test Intermediate", which signed CN=derp.example.com, is missing`},
		{"half a certificate", chainPEM(t, second, middle)[:200], keyPEM(t, second), "block 1 of "},
		{"half a key", chainPEM(t, second, middle), keyPEM(t, second)[:100], "its line -----END PRIVATE KEY----- is missing"},
		{"empty", nil, nil, "is empty"},
	}
	for _, l := range layouts {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				setClock()
				dir := t.TempDir()
				version := 0
				publish := func(cert, key []byte) {
					t.Helper()
					version++
					l.publish(t, dir, strconv.Itoa(version), cert, key)
				}
				publish(chainPEM(t, first, middle), keyPEM(t, first))
				m, err := certs.LoadManual(certs.ManualConfig{
					CertFile: filepath.Join(dir, l.certFile), KeyFile: filepath.Join(dir, l.keyFile),
					Names: []string{"derp.example.com"}, Roots: roots, Log: zerolog.Nop(),
				})
				if err != nil {
					t.Fatal(err)
				}
				s := serve(t, m, roots)
				seen := func(when string, want *tls.Certificate) {
					t.Helper()
					if !s.leaf(t).Equal(want.Leaf) {
						t.Errorf("%s: clients get the wrong certificate", when)
					}
				}
				seen("at the start", first)
				for _, fault := range faults {
					publish(fault.cert, fault.key)
					s.until(t, fault.name, func(st certs.Status) bool { return st.Err != nil && strings.Contains(st.Err.Error(), fault.want) })
					seen(fault.name, first)
				}
				if err := os.Remove(filepath.Join(dir, l.keyFile)); err != nil {
					t.Fatal(err)
				}
				s.until(t, "gone", func(st certs.Status) bool { return strings.Contains(st.Err.Error(), "no such file or directory") })
				seen("gone", first)

				publish(chainPEM(t, second, middle), keyPEM(t, second))
				s.until(t, "good files", func(st certs.Status) bool { return st.Leaf.Equal(second.Leaf) && st.Err == nil })
				seen("good files", second)
				if st := s.Status(); st.Reloads != 1 || st.ReloadErrors != uint64(len(faults)+1) {
					t.Errorf("counted %d reloads and %d errors, want 1 and %d", st.Reloads, st.ReloadErrors, len(faults)+1)
				}
			})
		})
	}
}

// A running relay reloads a rotated pinned certificate.
func TestPinnedRotatedWhileServing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		setClock()
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
	})
}
