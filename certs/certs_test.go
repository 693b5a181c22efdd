package certs_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"derpd/certs"
	"derpd/internal/testkit"
)

var now = time.Now()

func TestPinned(t *testing.T) {
	names := []string{"relay.example.com", "203.0.113.7", "2001:db8::7"}
	c := certs.PinnedConfig{Path: filepath.Join(t.TempDir(), "certs", "pinned.pem"), Names: names, Log: zerolog.Nop()}
	if _, err := certs.LoadPinned(c); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("without a file: %v, want fs.ErrNotExist", err)
	}
	m, err := certs.LoadOrCreatePinned(c)
	if err != nil {
		t.Fatal(err)
	}
	leaf := m.Status().Leaf
	sum := sha256.Sum256(leaf.Raw)
	if want := "sha256-raw:" + hex.EncodeToString(sum[:]); m.Status().Pin != want {
		t.Errorf("pin %q, want %q", m.Status().Pin, want)
	}
	for _, name := range names {
		if err := leaf.VerifyHostname(name); err != nil {
			t.Error(err)
		}
	}
	if bytes.Contains(bytes.ToLower(leaf.Raw), []byte("derp")) {
		t.Errorf("the certificate of %v names the program: subject %q", names, leaf.Subject)
	}
	if key, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		t.Errorf("key %T, want P-256", leaf.PublicKey)
	}
	if years := leaf.NotAfter.Year() - now.Year(); years != 10 {
		t.Errorf("valid for %d years, want 10", years)
	}
	if !leaf.NotBefore.Before(now.Add(-23 * time.Hour)) {
		t.Error("NotBefore refuses a client whose clock is some hours behind")
	}
	if info, err := os.Stat(c.Path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v; want mode 0600", info.Mode(), err)
	}
	if info, err := os.Stat(filepath.Dir(c.Path)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v; want mode 0700", info.Mode(), err)
	}
	if pin, err := os.ReadFile(c.Path + ".pin"); err != nil || string(pin) != m.Status().Pin+"\n" {
		t.Errorf("the file of the pin holds %q, %v; want %s", pin, err, m.Status().Pin)
	}
	trusted := x509.NewCertPool()
	trusted.AddCert(leaf)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: trusted, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil || len(leaf.ExtKeyUsage) != 1 || leaf.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("the certificate is not one of a server: %v, key usage %v %v", err, leaf.KeyUsage, leaf.ExtKeyUsage)
	}
	if shown, err := m.GetCertificate(nil); err != nil || !shown.Leaf.Equal(leaf) {
		t.Errorf("clients get %v, %v", shown, err)
	}
	select {
	case <-m.Ready():
	default:
		t.Error("not ready with a certificate")
	}
	w := httptest.NewRecorder()
	m.HTTPHandler(http.NotFoundHandler()).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody))
	if w.Code != http.StatusNotFound {
		t.Errorf("a request for the next handler: %d, want %d", w.Code, http.StatusNotFound)
	}

	// The certificate need not cover an address, because clients that dial an
	// address send no SNI and check no name.
	c.Names = []string{"203.0.113.9"}
	again, err := certs.LoadOrCreatePinned(c)
	if err != nil {
		t.Fatal(err)
	}
	if again.Status().Pin != m.Status().Pin {
		t.Error("the pin changed by a restart")
	}
}

// A rotation replaces the files, and never writes into one: a program that reads
// one meanwhile, and a backup by hard links, keep the old content. The new files
// belong to the user alone.
func TestPinnedRotationReplacesFiles(t *testing.T) {
	dir := t.TempDir()
	c := certs.PinnedConfig{Path: filepath.Join(dir, "pinned.pem"), Names: []string{"relay.example.com"}}
	if err := certs.RotatePinned(c, now); err != nil {
		t.Fatal(err)
	}
	old := make(map[string][]byte)
	for _, path := range []string{c.Path, c.Path + ".pin"} {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		old[path] = data
		if err := os.Link(path, path+".backup"); err != nil {
			t.Fatal(err)
		}
	}
	if err := certs.RotatePinned(c, now); err != nil {
		t.Fatal(err)
	}
	// Clients tell the two certificates apart by their serial numbers too.
	if m, err := certs.LoadPinned(c); err != nil || m.Status().Leaf.SerialNumber.BitLen() < 64 {
		t.Errorf("%v; want a serial number of at least 64 random bits (CA/Browser Forum, §7.1)", err)
	}
	for path, before := range old {
		after, err := os.ReadFile(path)
		kept, keptErr := os.ReadFile(path + ".backup")
		if err != nil || keptErr != nil || bytes.Equal(after, before) || !bytes.Equal(kept, before) {
			t.Errorf("%s was written in place, %v, %v", path, err, keptErr)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v; want mode 0600", info.Mode(), err)
		}
	}
}

// A name that is too long for the subject is still covered.
func TestPinnedLongName(t *testing.T) {
	name := strings.Repeat("a", 60) + ".relay.example.com"
	m, err := certs.LoadOrCreatePinned(certs.PinnedConfig{Path: filepath.Join(t.TempDir(), "pinned.pem"), Names: []string{name}})
	if err != nil {
		t.Fatal(err)
	}
	if s := m.Status(); s.Leaf.VerifyHostname(name) != nil || s.Leaf.Subject.CommonName != "" || s.Pin == "" {
		t.Errorf("subject %q, names %v, pin %q", s.Leaf.Subject, s.Leaf.DNSNames, s.Pin)
	}
}

// A broken file is never replaced by a new identity.
func TestPinnedRefuses(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, c *certs.PinnedConfig)
		want  string
	}{
		{"another name", func(_ *testing.T, c *certs.PinnedConfig) { c.Names = []string{"new.example.com"} }, "covers relay.example.com, not new.example.com; make a new one with `derpd pin --rotate`"},
		{"expired", func(t *testing.T, c *certs.PinnedConfig) {
			t.Helper()
			if err := certs.RotatePinned(*c, now.AddDate(-10, 0, -2)); err != nil {
				t.Fatal(err)
			}
		}, "expired on " + now.AddDate(0, 0, -2).UTC().Format(time.DateOnly)},
		{"half a file", func(t *testing.T, c *certs.PinnedConfig) {
			t.Helper()
			if err := os.Truncate(c.Path, 300); err != nil {
				t.Fatal(err)
			}
		}, "is damaged"},
		{"empty", func(t *testing.T, c *certs.PinnedConfig) {
			t.Helper()
			if err := os.Truncate(c.Path, 0); err != nil {
				t.Fatal(err)
			}
		}, "is damaged"},
		{"lost", func(t *testing.T, c *certs.PinnedConfig) {
			t.Helper()
			if err := os.Remove(c.Path); err != nil {
				t.Fatal(err)
			}
		}, "is lost: clients expect sha256-raw:"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := certs.PinnedConfig{Path: filepath.Join(t.TempDir(), "pinned.pem"), Names: []string{"relay.example.com"}}
			if _, err := certs.LoadOrCreatePinned(c); err != nil {
				t.Fatal(err)
			}
			tt.spoil(t, &c)
			before, _ := os.ReadFile(c.Path)
			_, err := certs.LoadOrCreatePinned(c)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q in it", err, tt.want)
			}
			if after, _ := os.ReadFile(c.Path); !bytes.Equal(before, after) {
				t.Error("the file was changed")
			}
		})
	}
}

// issue signs a certificate; a nil parent makes it self-signed.
func issue(t *testing.T, name string, isCA bool, notBefore, notAfter time.Time, parent *tls.Certificate) *tls.Certificate {
	t.Helper()
	return testkit.NewCertificate(t, testkit.Certificate{Names: []string{name}, NotBefore: notBefore, NotAfter: notAfter, CA: isCA, Issuer: parent})
}

func chainPEM(_ *testing.T, chain ...*tls.Certificate) []byte { return testkit.ChainPEM(chain...) }

func keyPEM(t *testing.T, c *tls.Certificate) []byte { return testkit.KeyPEM(t, c) }

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
