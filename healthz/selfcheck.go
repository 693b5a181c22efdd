package healthz

import (
	"context"
	"errors"
	"sync"
	"time"
)

// The self-check's pace. A relay that refuses clients at once is found out
// within 5 seconds, one that lets them hang within 11: three failures in a row,
// so that one slow handshake does not send clients away. A probe takes 3 ms of
// CPU time, client and relay together: a thousandth of a core.
const (
	checkEvery   = 3 * time.Second
	recheckAfter = time.Second // of a failure, and while the relay does not serve
	probeTimeout = 2 * time.Second

	failuresToStop   = 3 // in a row, until the relay is said not to serve
	successesToServe = 2 // in a row, until it is said to serve again
)

// errUnchecked is the state before the first probe.
var errUnchecked = errors.New("not checked yet")

// SelfCheck tries a relay again and again, as its clients would, and decides
// whether it serves them.
type SelfCheck struct {
	probe   func(context.Context) (time.Duration, error)
	changed func(serving bool, cause error)

	mu     sync.Mutex
	state  State // guarded by mu
	inRow  int   // probes with the latest outcome; guarded by mu
	served bool  // whether it ever served; guarded by mu
}

// State is what the self-check knows.
type State struct {
	// Serving is the decision: it changes only after several probes.
	Serving bool

	// Took and Err are how the latest probe went.
	Took time.Duration
	Err  error

	// Failures counts the probes that failed, since the start.
	Failures uint64
}

// NewSelfCheck returns a self-check by the probe. It starts out as not serving;
// changed is told, from one goroutine, when that changes, and why; and once when
// it does not serve from the start.
func NewSelfCheck(probe func(context.Context) (time.Duration, error), changed func(serving bool, cause error)) *SelfCheck {
	return &SelfCheck{probe: probe, changed: changed, state: State{Err: errUnchecked}}
}

// State is the outcome of the latest probe, and what follows from all.
func (s *SelfCheck) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// Run probes until ctx ends. After that changed is not called any more.
func (s *SelfCheck) Run(ctx context.Context) error {
	for {
		began := time.Now()
		probing, cancel := context.WithTimeout(ctx, probeTimeout)
		took, err := s.probe(probing)
		cancel()
		if ctx.Err() != nil {
			return nil // which may be why it failed
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

// note takes one outcome in, and reports whether there is news.
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
		// A start is no recovery: every second of it is one without a
		// relay.
		s.served, s.state.Serving = true, true
	default:
		s.state.Serving = was || s.inRow >= successesToServe
	}
	return s.state.Serving != was, s.state
}
