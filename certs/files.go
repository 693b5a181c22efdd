package certs

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"

	"github.com/rs/zerolog"

	"derpd/internal/filewatch"
)

// files is the [Manager] of a certificate in files. It reloads the certificate
// when the files change, and keeps the old one while the new files are invalid.
type files struct {
	paths []string
	load  func() (loaded, error) // reads and validates the files
	log   zerolog.Logger
	ready chan struct{} // closed from the start

	current atomic.Pointer[tls.Certificate]

	mu   sync.Mutex
	seen filewatch.Fingerprint // of the last load; guarded by mu
	err  error                 // of the last load; guarded by mu

	reloads, reloadErrors uint64 // guarded by mu
}

// loaded is the content of valid files.
type loaded struct {
	cert *tls.Certificate

	// authority is the name of the authority that this machine does not trust,
	// and clients must; empty for none.
	authority string

	// unsent describes the parts of the files that clients do not get.
	unsent []string
}

// newFiles loads the files. It fails when the files are invalid.
func newFiles(paths []string, load func() (loaded, error), log zerolog.Logger) (*files, error) {
	f := &files{paths: paths, load: load, log: log, ready: make(chan struct{})}
	f.seen = filewatch.Read(paths)
	found, err := load()
	if err != nil {
		return nil, err
	}
	f.use(found)
	close(f.ready)
	return f, nil
}

// use serves a certificate from now on, and logs what clients may notice.
func (f *files) use(found loaded) {
	f.current.Store(found.cert)
	if found.authority != "" {
		f.log.Warn().Str("authority", found.authority).Msg("clients need the certificate of this authority installed; this machine does not trust it")
	}
	if len(found.unsent) > 0 {
		f.log.Info().Strs("blocks", found.unsent).Msg("clients do not get these blocks of the certificate file, which are not part of the chain")
	}
}

// reload loads the files if their content has changed.
func (f *files) reload() {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := filewatch.Read(f.paths)
	if now == f.seen {
		return
	}
	f.seen = now
	found, err := f.load()
	if err != nil {
		f.reloadErrors++
		f.err = fmt.Errorf("the new files are invalid and the old certificate is still served: %w", err)
		f.log.Error().Err(err).Msg("certificate files are invalid; the old certificate is still served")
		return
	}
	f.err = nil
	f.reloads++
	f.use(found)
	leaf := found.cert.Leaf
	f.log.Info().Str("names", covered(leaf)).Time("not_after", leaf.NotAfter).Msg("certificate reloaded")
}

// Run implements [Manager].
func (f *files) Run(ctx context.Context) error {
	return filewatch.Run(ctx, filewatch.Config{Paths: f.paths, Changed: f.reload})
}

// GetCertificate implements [Manager].
func (f *files) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return f.current.Load(), nil
}

// HTTPHandler implements [Manager].
func (f *files) HTTPHandler(next http.Handler) http.Handler { return next }

// Ready implements [Manager].
func (f *files) Ready() <-chan struct{} { return f.ready }

// Status implements [Manager].
func (f *files) Status() Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	cert := f.current.Load()
	s := Status{Leaf: cert.Leaf, Chain: cert.Certificate, Err: f.err, Reloads: f.reloads, ReloadErrors: f.reloadErrors}
	// Clients with a pin accept one certificate, not a chain (tlsdial's
	// SetConfigExpectedCertHash).
	if len(cert.Certificate) == 1 && selfSigned(cert.Leaf) {
		s.Pin = Pin(cert.Leaf)
	}
	return s
}
