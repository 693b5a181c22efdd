package certs

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
)

// A certificate and its key stay a pair: when the process ends between the two
// writes, and when certmagic deletes both after a failed write.
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
		t.Error("an empty storage holds a certificate")
	}
	key, cert := pair()
	store(s, keyFile, key)
	if open().Exists(ctx, keyFile) {
		t.Error("a key without its certificate is stored after a crash")
	}
	store(s, certFile, cert)
	first := stored(open())
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v; want mode 0600", info.Mode(), err)
	}

	key, _ = pair()
	store(s, keyFile, key)
	if string(stored(open())) != string(first) {
		t.Error("a renewal that stored only the key changed the pair")
	}
	for _, name := range []string{certFile, keyFile, "certificates/ca/derp.example.com"} {
		if err := s.Delete(ctx, name); err != nil {
			t.Fatal(err)
		}
	}
	if string(stored(open())) != string(first) {
		t.Error("Delete has deleted the pair")
	}

	if err := os.Truncate(file, 300); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load(ctx, certFile); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a damaged pair: %v, want fs.ErrNotExist", err)
	}
	if s.Exists(ctx, certFile) || s.Exists(ctx, keyFile) {
		t.Error("a damaged pair exists")
	}
}

// A lock is exclusive within the process. Waiting for it ends with the context.
func TestStorageLocks(t *testing.T) {
	ctx, s := context.Background(), newStorage(t.TempDir(), nil)
	var _ certmagic.TryLocker = s
	if err := s.Lock(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if ok, err := s.TryLock(ctx, "a"); ok || err != nil {
		t.Errorf("TryLock returned a held lock: %v", err)
	}
	if ok, err := s.TryLock(ctx, "b"); !ok || err != nil {
		t.Errorf("TryLock refused a free lock: %v", err)
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

// Stored counts certificates that are complete and have not expired.
func TestStored(t *testing.T) {
	const directory = "https://ca.example.com/dir"
	now := time.Now()
	for _, tt := range []struct {
		name  string
		made  map[string]time.Time // the certificates are valid for ten years
		names []string
		want  bool
	}{
		{"good", map[string]time.Time{"a.example.com": now}, []string{"a.example.com"}, true},
		{"expired", map[string]time.Time{"a.example.com": now.AddDate(-10, 0, -1)}, []string{"a.example.com"}, false},
		{"one day left", map[string]time.Time{"a.example.com": now.AddDate(-10, 0, 1)}, []string{"a.example.com"}, true},
		{"all names", map[string]time.Time{"a.example.com": now, "b.example.com": now}, []string{"a.example.com", "b.example.com"}, true},
		{"a name without", map[string]time.Time{"a.example.com": now}, []string{"a.example.com", "b.example.com"}, false},
		{"the second expired", map[string]time.Time{"a.example.com": now, "b.example.com": now.AddDate(-10, 0, -1)}, []string{"a.example.com", "b.example.com"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := ACMEConfig{Names: tt.names, Directory: directory, Dir: t.TempDir()}
			s := newStorage(c.Dir, func(error) {})
			for name, made := range tt.made {
				_, both, err := newPinned([]string{name}, made)
				if err != nil {
					t.Fatal(err)
				}
				certificate, private := pem.Decode(both)
				authority := (&certmagic.ACMEIssuer{CA: directory}).IssuerKey()
				err = errors.Join(
					s.Store(t.Context(), certmagic.StorageKeys.SitePrivateKey(authority, name), private),
					s.Store(t.Context(), certmagic.StorageKeys.SiteCert(authority, name), pem.EncodeToMemory(certificate)),
				)
				if err != nil {
					t.Fatal(err)
				}
			}
			if got := c.Stored(); got != tt.want {
				t.Errorf("got %t, want %t", got, tt.want)
			}
			c.Directory = "https://another.example.com/dir"
			if c.Stored() {
				t.Error("another authority's certificate counts")
			}
		})
	}
}

// Accounts are stored, deleted and not listed. Each write is reported.
func TestStorageOfAccounts(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	var wrote []error
	s := newStorage(dir, func(err error) { wrote = append(wrote, err) })
	const account = "acme/ca/users/default/default.json"
	if err := s.Store(ctx, account, []byte("{}")); err != nil {
		t.Fatal(err)
	}
	if data, err := s.Load(ctx, account); err != nil || string(data) != "{}" || !s.Exists(ctx, account) {
		t.Errorf("%q, %v", data, err)
	}
	if found, err := s.List(ctx, "acme", true); len(found) != 0 || err != nil {
		t.Errorf("listed %q, %v; want nothing", found, err)
	}
	// A key is not written before its certificate.
	if err := s.Store(ctx, "certificates/ca/a/a.key", []byte("key")); err != nil {
		t.Fatal(err)
	}
	if len(wrote) != 1 || wrote[0] != nil {
		t.Errorf("reported %v, want one success", wrote)
	}
	if err := s.Delete(ctx, account); err != nil || s.Exists(ctx, account) {
		t.Errorf("the account is not deleted: %v", err)
	}
	// A file in place of the directory.
	if err := os.WriteFile(filepath.Join(dir, "certificates"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Store(ctx, "certificates/ca/a/a.crt", []byte("certificate")); err == nil || len(wrote) != 2 || wrote[1] == nil {
		t.Errorf("%v, reported %v; want a failure", err, wrote)
	}
}

func TestNotStored(t *testing.T) {
	uid := strconv.Itoa(os.Getuid())
	for _, tt := range []struct {
		err  error
		want string
	}{
		{syscall.ENOSPC, "no space left on device; make room there"},
		{syscall.EDQUOT, "disk quota exceeded; make room there"},
		{syscall.EROFS, "read-only file system; mount it for writing"},
		{syscall.EACCES, "permission denied; make it writable for uid " + uid + ", as which derpd runs"},
		{errors.New("odd"), "odd; make it writable for uid " + uid + ", as which derpd runs"},
	} {
		got := notStored("/data/certs", &fs.PathError{Op: "write", Path: "/data/certs/x", Err: tt.err})
		want := "certificates cannot be stored in /data/certs: " + tt.want + "; derpd tries again by itself"
		if tt.err.Error() == "odd" {
			want = strings.Replace(want, "odd", "write /data/certs/x: odd", 1)
		}
		if got.Error() != want || got.kind != "storage" || !errors.Is(got, tt.err) {
			t.Errorf("kind %s\n%s\nwant\n%s", got.kind, got, want)
		}
	}
}
