package healthz

import (
	"context"
	"errors"
	"sync"
	"time"
)

// The self-check needs three failures in a row, so that one slow handshake does not
// drive clients away. It takes up to 5 seconds when the relay refuses clients, and
// up to 11 when clients wait for a timeout. A probe every 3 seconds uses a
// thousandth of a core.
const (
	checkEvery   = 3 * time.Second // from one probe to the next while the relay serves
	recheckAfter = time.Second     // after a failure, and while the relay does not serve
	probeTimeout = 2 * time.Second

	failuresToStop   = 3 // failures in a row that end serving
	successesToServe = 2 // successes in a row that begin it again
)

// errUnchecked is the error before the first probe.
var errUnchecked = errors.New("not checked yet")

// SelfCheck repeats a probe and decides whether the relay serves clients.
type SelfCheck struct {
	probe   func(context.Context) (time.Duration, error)
	changed func(serving bool, cause error)

	mu     sync.Mutex
	state  State // guarded by mu
	inRow  int   // latest probes with the same outcome; guarded by mu
	served bool  // whether the relay has ever served; guarded by mu
}

// State is the state of a [SelfCheck].
type State struct {
	// Serving is the decision. Only several probes in a row change it.
	Serving bool

	// Took and Err are the duration and the error of the latest probe.
	Took time.Duration
	Err  error

	// Failures is the number of failed probes since the start.
	Failures uint64
}

// NewSelfCheck returns a self-check in the state not serving. changed is called
// from one goroutine on every change of state, and once if the relay never starts
// to serve.
func NewSelfCheck(probe func(context.Context) (time.Duration, error), changed func(serving bool, cause error)) *SelfCheck {
	return &SelfCheck{probe: probe, changed: changed, state: State{Err: errUnchecked}}
}

// State returns the current state.
func (s *SelfCheck) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// Run probes until ctx ends. It does not call changed after that.
func (s *SelfCheck) Run(ctx context.Context) error {
	for {
		began := time.Now()
		probing, cancel := context.WithTimeout(ctx, probeTimeout)
		took, err := s.probe(probing)
		cancel()
		if ctx.Err() != nil {
			return nil // the probe may have failed because of that
		}
		changed, state := s.note(took, err)
		if changed {
			s.changed(state.Serving, state.Err)
		}
		wait := recheckAfter
		if state.Serving && state.Err == nil {
			wait = checkEvery - time.Since(began)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}

// note records the outcome of a probe, and reports whether to call changed.
func (s *SelfCheck) note(took time.Duration, err error) (bool, State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if (err == nil) != (s.state.Err == nil) {
		s.inRow = 0
	}
	s.inRow++
	s.state.Took, s.state.Err = took, err
	was := s.state.Serving
	switch {
	case err != nil:
		s.state.Failures++
		s.state.Serving = was && s.inRow < failuresToStop
		if !s.served && s.inRow == failuresToStop {
			return true, s.state
		}
	case !s.served:
		// One success is enough at the start, because every second of
		// the start is a second without a relay.
		s.served, s.state.Serving = true, true
	default:
		s.state.Serving = was || s.inRow >= successesToServe
	}
	return s.state.Serving != was, s.state
}
