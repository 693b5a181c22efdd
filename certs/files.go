package certs

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"net/http"
	"os"
	"sync"
	"sync/atomic"

	"github.com/rs/zerolog"

	"derpd/filewatch"
)

// files is a certificate that is kept in files, and served anew when they
// change. Whatever is wrong with the new ones, the old certificate stays.
type files struct {
	paths []string
	load  func() (*tls.Certificate, error) // reads and validates
	log   zerolog.Logger
	ready chan struct{} // closed from the start

	current atomic.Pointer[tls.Certificate]

	mu   sync.Mutex
	seen [sha256.Size]byte // of what was looked at last; guarded by mu
	err  error             // what is wrong with it; guarded by mu

	reloads, reloadErrors uint64 // guarded by mu
}

// newFiles loads the files for the first time.
func newFiles(paths []string, load func() (*tls.Certificate, error), log zerolog.Logger) (*files, error) {
	f := &files{paths: paths, load: load, log: log, ready: make(chan struct{})}
	f.seen = f.fingerprint()
	cert, err := load()
	if err != nil {
		return nil, err
	}
	f.current.Store(cert)
	close(f.ready)
	return f, nil
}

// fingerprint tells two states of the files apart, by their content: time
// stamps are coarse, and a link that is swapped may bring an older one.
func (f *files) fingerprint() [sha256.Size]byte {
	h := sha256.New()
	for _, path := range f.paths {
		data, err := os.ReadFile(path)
		// Length first, so that bytes cannot move from one file to the next.
		_, _ = fmt.Fprintf(h, "%d %v\n", len(data), err)
		_, _ = h.Write(data)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// reload looks at the files, and takes them if they are new and good.
func (f *files) reload() {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.fingerprint()
	if now == f.seen {
		return
	}
	f.seen = now
	cert, err := f.load()
	if err != nil {
		f.reloadErrors++
		f.err = fmt.Errorf("the new files were not taken, the old certificate stays: %w", err)
		f.log.Error().Err(err).Msg("certificate files not taken, the old certificate stays")
		return
	}
	f.err = nil
	f.reloads++
	f.current.Store(cert)
	f.log.Info().Str("names", covered(cert.Leaf)).Time("not_after", cert.Leaf.NotAfter).Msg("certificate files taken")
}

// Run implements [Manager].
func (f *files) Run(ctx context.Context) error {
	return filewatch.Run(ctx, filewatch.Config{Paths: f.paths, Look: f.reload, Log: f.log})
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
	s := Status{Leaf: cert.Leaf, Err: f.err, Reloads: f.reloads, ReloadErrors: f.reloadErrors}
	// Clients that pin want the certificate alone (tlsdial's
	// SetConfigExpectedCertHash).
	if len(cert.Certificate) == 1 && selfSigned(cert.Leaf) {
		s.Pin = Pin(cert.Leaf)
	}
	return s
}
