package certs

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"derpd/internal/filewatch"
)

// files is the [Manager] of a certificate in files. It reloads the certificate
// when the files change. It keeps the old one while the new files are invalid, and
// while they need a new map that nobody has accepted (accept.go).
type files struct {
	paths   []string
	load    func() (loaded, error) // reads and validates the files
	changed func(certName string)  // see [ManualConfig]; nil for none
	log     zerolog.Logger
	ready   chan struct{} // closed from the start

	current atomic.Pointer[loaded]

	mu      sync.Mutex
	seen    filewatch.Fingerprint // of the last load; guarded by mu
	err     error                 // of the last load; guarded by mu
	waiting *loaded               // for Accept, nil for none; guarded by mu

	reloads, reloadErrors uint64 // guarded by mu
}

// loaded is the content of valid files.
type loaded struct {
	cert *tls.Certificate

	// check returns why every client refuses the certificate at a time, or nil.
	check func(now time.Time) error

	// meant reports whether a command of derpd has made the certificate.
	meant bool

	// authority is the name of the authority that this machine does not trust,
	// and clients must; empty for none.
	authority string

	// unsent describes the parts of the files that clients do not get.
	unsent []string
}

// equal reports whether clients get the same from both.
func (l *loaded) equal(other *loaded) bool {
	return slices.EqualFunc(l.cert.Certificate, other.cert.Certificate, bytes.Equal)
}

// newFiles loads the files. It fails when the files are invalid.
func newFiles(paths []string, load func() (loaded, error), changed func(string), log zerolog.Logger) (*files, error) {
	f := &files{paths: paths, load: load, changed: changed, log: log, ready: make(chan struct{})}
	f.seen = filewatch.Read(paths)
	found, err := load()
	if err != nil {
		return nil, err
	}
	f.use(&found)
	close(f.ready)
	return f, nil
}

// use serves a certificate from now on, and logs what clients may notice.
func (f *files) use(found *loaded) {
	f.current.Store(found)
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
	f.reloadLocked()
}

func (f *files) lastSeen() filewatch.Fingerprint {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.seen
}

func (f *files) reloadLocked() {
	now := filewatch.Read(f.paths)
	if now == f.seen {
		return
	}
	f.seen, f.waiting = now, nil
	found, err := f.load()
	if err != nil {
		f.reloadErrors++
		f.err = fmt.Errorf("the new files are invalid and the old certificate is still served: %w", err)
		f.log.Error().Err(err).Msg("certificate files are invalid; the old certificate is still served")
		return
	}
	switch {
	case f.current.Load().equal(&found):
		f.err = nil
	case f.mustWait(&found, time.Now()):
		f.hold(&found)
	default:
		f.replace(&found)
	}
}

// replace serves another certificate in place of the present one.
func (f *files) replace(found *loaded) {
	before := f.current.Load().certName()
	f.waiting, f.err = nil, nil
	f.reloads++
	f.use(found)
	leaf := found.cert.Leaf
	f.log.Info().Str("names", covered(leaf)).Time("not_after", leaf.NotAfter).Msg("certificate reloaded")
	if name := found.certName(); name != before && f.changed != nil {
		f.changed(name)
	}
}

// Reload loads the files at once if their content has changed, and returns their paths.
func (f *files) Reload() []string {
	f.reload()
	return f.paths
}

// Run implements [Manager].
func (f *files) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { f.replaceUseless(ctx) })
	err := filewatch.Run(ctx, filewatch.Config{Paths: f.paths, Changed: f.reload, Seen: f.lastSeen})
	wg.Wait()
	return err
}

// GetCertificate implements [Manager].
func (f *files) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return f.current.Load().cert, nil
}

// HTTPHandler implements [Manager].
func (f *files) HTTPHandler(next http.Handler) http.Handler { return next }

// Ready implements [Manager].
func (f *files) Ready() <-chan struct{} { return f.ready }

// Status implements [Manager].
func (f *files) Status() Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	current := f.current.Load()
	s := Status{
		Leaf: current.cert.Leaf, Chain: current.cert.Certificate, Pin: current.certName(),
		Err: f.err, Reloads: f.reloads, ReloadErrors: f.reloadErrors,
	}
	if f.waiting != nil {
		s.Waiting = f.waiting.cert.Leaf
	}
	return s
}
