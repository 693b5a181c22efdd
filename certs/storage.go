package certs

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/caddyserver/certmagic"
)

// damagedError is the error of a stored certificate that cannot be used. It is an
// [fs.ErrNotExist], so that certmagic obtains another certificate.
type damagedError struct{ error }

// Is implements the interface of [errors.Is].
func (damagedError) Is(target error) bool { return target == fs.ErrNotExist }

// storage is certmagic's file storage with four changes. They make the storage safe
// against a kill at any moment and against a full disk:
//
//   - Store writes a certificate and its key into one file, so that a crash loses
//     both or neither. certmagic stores the key first and then the certificate.
//   - Delete keeps certificates. After a failed write, certmagic deletes both files,
//     and would delete the certificate in use.
//   - Lock keeps locks in memory, because only one relay uses a data directory. A
//     lock file would outlive a killed relay, and block the next start.
//   - List returns nothing. certmagic lists accounts only to guess a default
//     e-mail address, and a half-written account would confuse it.
type storage struct {
	*certmagic.FileStorage
	wrote func(error) // called with the result of each write

	mu    sync.Mutex
	keys  map[string][]byte        // private keys without a stored certificate, by file; guarded by mu
	locks map[string]chan struct{} // a full channel is a held lock; guarded by mu
}

// Stored reports whether Dir contains a certificate for every name, none of them
// expired. If so, the relay can start on a read-only volume.
func (c ACMEConfig) Stored() bool {
	stored := newStorage(c.Dir, nil)
	authority := (&certmagic.ACMEIssuer{CA: c.Directory}).IssuerKey()
	for _, name := range c.Names {
		data, err := stored.Load(context.Background(), certmagic.StorageKeys.SiteCert(authority, name))
		if err != nil {
			return false
		}
		pair, err := tls.X509KeyPair(data, data)
		if err != nil || time.Now().After(pair.Leaf.NotAfter) {
			return false
		}
	}
	return true
}

func newStorage(dir string, wrote func(error)) *storage {
	return &storage{
		FileStorage: &certmagic.FileStorage{Path: dir}, wrote: wrote,
		keys: make(map[string][]byte), locks: make(map[string]chan struct{}),
	}
}

// site reports whether key names a certificate or its private key, and returns
// the file of both.
func site(key string) (file string, ok bool) {
	extension := path.Ext(key)
	if !strings.HasPrefix(key, "certificates/") || extension != ".key" && extension != ".crt" {
		return key, false
	}
	return strings.TrimSuffix(key, extension) + ".pem", true
}

// Store implements [certmagic.Storage].
func (s *storage) Store(ctx context.Context, key string, value []byte) error {
	file, ok := site(key)
	if ok {
		s.mu.Lock()
		if path.Ext(key) == ".key" {
			s.keys[file] = value
			s.mu.Unlock()
			return nil
		}
		value = bytes.Join([][]byte{value, s.keys[file]}, nil)
		s.mu.Unlock()
	}
	err := s.FileStorage.Store(ctx, file, value)
	s.wrote(err)
	return err
}

// Load implements [certmagic.Storage]. It returns the whole file for a certificate
// and for its key, because PEM readers skip blocks of other types.
func (s *storage) Load(ctx context.Context, key string) ([]byte, error) {
	file, ok := site(key)
	data, err := s.FileStorage.Load(ctx, file)
	if err != nil || !ok {
		return data, err
	}
	if _, err := tls.X509KeyPair(data, data); err != nil {
		return nil, damagedError{fmt.Errorf("%s: %w", s.Filename(file), err)}
	}
	return data, nil
}

// Exists implements [certmagic.Storage].
func (s *storage) Exists(ctx context.Context, key string) bool {
	if _, ok := site(key); !ok {
		return s.FileStorage.Exists(ctx, key)
	}
	_, err := s.Load(ctx, key)
	return !errors.Is(err, fs.ErrNotExist)
}

// Delete implements [certmagic.Storage].
func (s *storage) Delete(ctx context.Context, key string) error {
	if strings.HasPrefix(key, "certificates/") {
		return nil
	}
	return s.FileStorage.Delete(ctx, key)
}

// List implements [certmagic.Storage].
func (s *storage) List(context.Context, string, bool) ([]string, error) { return nil, nil }

// lock returns the channel of a lock.
func (s *storage) lock(name string) chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.locks[name] == nil {
		s.locks[name] = make(chan struct{}, 1)
	}
	return s.locks[name]
}

// Lock implements [certmagic.Locker].
func (s *storage) Lock(ctx context.Context, name string) error {
	select {
	case s.lock(name) <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// TryLock implements [certmagic.TryLocker].
func (s *storage) TryLock(_ context.Context, name string) (bool, error) {
	select {
	case s.lock(name) <- struct{}{}:
		return true, nil
	default:
		return false, nil
	}
}

// Unlock implements [certmagic.Locker]. The lock must be held.
func (s *storage) Unlock(_ context.Context, name string) error {
	<-s.lock(name)
	return nil
}

// notStored explains a failed write, with the remedy.
func notStored(dir string, err error) *explained {
	remedy := fmt.Sprintf("make it writable for uid %d, as which derpd runs", os.Getuid())
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		remedy = "make room there"
	case errors.Is(err, syscall.EROFS):
		remedy = "mount it for writing"
	}
	words := err.Error()
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		words = errno.Error()
	}
	words = fmt.Sprintf("certificates cannot be stored in %s: %s; %s; derpd tries again by itself", dir, words, remedy)
	return &explained{"storage", words, err}
}
