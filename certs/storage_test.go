package certs

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
)

// What certmagic writes one after the other never leaves half of it: neither
// when the process ends in between, nor when it takes back what it could not
// write as a whole.
func TestStorageKeepsPairs(t *testing.T) {
	const keyFile, certFile = "certificates/ca/derp.example.com/derp.example.com.key", "certificates/ca/derp.example.com/derp.example.com.crt"
	ctx, dir := context.Background(), t.TempDir()
	file := filepath.Join(dir, "certificates/ca/derp.example.com/derp.example.com.pem")
	open := func() *storage { return newStorage(dir, func(error) {}) }
	pair := func() (key, cert []byte) {
		t.Helper()
		_, both, err := newPinned([]string{"derp.example.com"}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		certificate, private := pem.Decode(both)
		return private, pem.EncodeToMemory(certificate)
	}
	stored := func(s *storage) []byte {
		t.Helper()
		cert, err := s.Load(ctx, certFile)
		if err != nil {
			t.Fatal(err)
		}
		key, err := s.Load(ctx, keyFile)
		if err != nil {
			t.Fatal(err)
		}
		p, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		return p.Certificate[0]
	}
	store := func(s *storage, key string, data []byte) {
		t.Helper()
		if err := s.Store(ctx, key, data); err != nil {
			t.Fatal(err)
		}
	}

	s := open()
	if s.Exists(ctx, certFile) || s.Exists(ctx, keyFile) {
		t.Error("there is something before anything was stored")
	}
	key, cert := pair()
	store(s, keyFile, key)
	if open().Exists(ctx, keyFile) {
		t.Error("a key without its certificate is there after a crash")
	}
	store(s, certFile, cert)
	first := stored(open())
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v; want mode 0600", info.Mode(), err)
	}

	key, _ = pair()
	store(s, keyFile, key)
	if string(stored(open())) != string(first) {
		t.Error("a renewal that got no further than the key changed the pair")
	}
	for _, name := range []string{certFile, keyFile} {
		if err := s.Delete(ctx, name); err != nil {
			t.Fatal(err)
		}
	}
	if string(stored(open())) != string(first) {
		t.Error("what was taken back is gone")
	}

	if err := os.Truncate(file, 300); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load(ctx, certFile); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a damaged pair: %v, want it to count as none", err)
	}
	if s.Exists(ctx, certFile) || s.Exists(ctx, keyFile) {
		t.Error("a damaged pair is said to exist")
	}
}

// Locks hold within the process, and wait no longer than their context.
func TestStorageLocks(t *testing.T) {
	ctx, s := context.Background(), newStorage(t.TempDir(), nil)
	var _ certmagic.TryLocker = s
	if err := s.Lock(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if ok, err := s.TryLock(ctx, "a"); ok || err != nil {
		t.Errorf("a lock that is held was given: %v", err)
	}
	if ok, err := s.TryLock(ctx, "b"); !ok || err != nil {
		t.Errorf("another lock was not given: %v", err)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if err := s.Lock(ended, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the end of the context", err)
	}
	if err := s.Unlock(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if err := s.Lock(ctx, "a"); err != nil {
		t.Error(err)
	}
}
