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

	"github.com/caddyserver/certmagic"
)

// damagedError is about a stored certificate that cannot be used. It counts as
// none, so that another one is obtained.
type damagedError struct{ error }

// Is makes it an [fs.ErrNotExist].
func (damagedError) Is(target error) bool { return target == fs.ErrNotExist }

// storage is certmagic's file storage, made safe against a kill at any moment
// and a full disk:
//
//   - Certificate and key are one file, so that no crash can part them.
//     certmagic writes the key first, and then the certificate.
//   - What was stored is never deleted. certmagic deletes to undo what it could
//     not store as a whole, and would take the certificate in use with it.
//   - Locks are held in memory: there is one relay to a data directory. Those in
//     files outlive a relay that was killed, and the next one waits for them.
//   - Nothing is listed. certmagic lists accounts to guess the e-mail address
//     when none is given, and takes a directory that holds half of one for it.
type storage struct {
	*certmagic.FileStorage
	wrote func(error) // told how each write went

	mu    sync.Mutex
	keys  map[string][]byte        // by the file of their certificate, which is still to come; guarded by mu
	locks map[string]chan struct{} // full while held; guarded by mu
}

func newStorage(dir string, wrote func(error)) *storage {
	return &storage{
		FileStorage: &certmagic.FileStorage{Path: dir}, wrote: wrote,
		keys: make(map[string][]byte), locks: make(map[string]chan struct{}),
	}
}

// site reports whether key is of a certificate or its private key, and gives
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

// Load implements [certmagic.Storage]. Readers of PEM pass over what they do not
// look for.
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

// Unlock implements [certmagic.Locker].
func (s *storage) Unlock(_ context.Context, name string) error {
	<-s.lock(name)
	return nil
}

// notStored says what keeps certificates from being stored, and the remedy.
func notStored(dir string, err error) *explained {
	remedy := fmt.Sprintf("derpd runs as uid %d, which must be able to write there", os.Getuid())
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
