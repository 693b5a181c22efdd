// Package accept lets TCP listeners and the STUN socket go on after an error. accept(2)
// and recvmsg(2) fail for reasons that pass, such as no descriptor, no memory or a
// network that is down. Only a closed socket ends their loops.
//
//   - failures.go pauses after an error, and logs the first one
//   - listener.go is a TCP listener whose Accept fails only after Close
package accept

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
)

const (
	firstPause = 5 * time.Millisecond
	maxPause   = time.Second

	// settled is the time without an error after which a success ends a state of
	// failure. A socket that fails every second time stays in that state.
	settled = 10 * time.Second
)

// Failures are the errors of one socket.
type Failures struct {
	name string // of the socket
	log  zerolog.Logger

	failing atomic.Bool // since the log line; written with mu held

	mu    sync.Mutex
	last  time.Time     // of the last error; guarded by mu
	pause time.Duration // after the next error; guarded by mu
}

// NewFailures returns the Failures of a socket that has not failed.
func NewFailures(name string, log zerolog.Logger) *Failures {
	return &Failures{name: name, log: log, pause: firstPause}
}

// Failed notes an error, and returns the pause before the next try: 5 ms at first,
// and twice the pause before up to a second. It logs the first error of a state.
func (f *Failures) Failed(err error) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.failing.Swap(true) {
		f.log.Warn().Err(err).Str("socket", f.name).Msg("socket fails; derpd retries until it works")
	}
	f.last = time.Now()
	pause := f.pause
	f.pause = min(2*pause, maxPause)
	return pause
}

// Succeeded ends a pause that has grown, and after ten seconds without an error the
// state of failure. It costs next to nothing while the socket works.
func (f *Failures) Succeeded() {
	if !f.failing.Load() {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pause = firstPause
	if time.Since(f.last) >= settled {
		f.failing.Store(false)
		f.log.Info().Str("socket", f.name).Msg("socket works again")
	}
}
