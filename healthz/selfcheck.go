package healthz

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// The self-check needs three failures in a row, so that one slow handshake does not
// drive clients away. A timeout is followed by a patient probe, which takes as long as
// two others and counts as two: a relay that is slow then succeeds, and is overloaded.
// The self-check takes up to 5 seconds when the relay refuses clients, and up to 11
// when clients wait for a timeout. A probe every 3 seconds uses a thousandth of a core.
const (
	checkEvery   = 3 * time.Second // from one probe to the next while the relay serves
	recheckAfter = time.Second     // after a failure, and while the relay does not serve
	probeTimeout = 2 * time.Second

	patientTimeout = 2*probeTimeout + recheckAfter // of the probe after a timeout

	failuresToStop   = 3 // failures in a row that end serving
	successesToServe = 2 // successes in a row that begin it again
	quickToRecover   = 3 // quick successes in a row that end an overload
)

// errUnchecked is the error before the first probe.
var errUnchecked = errors.New("not checked yet")

// SelfCheck repeats a probe and decides whether the relay serves clients.
type SelfCheck struct {
	probe      func(context.Context) (time.Duration, error)
	overloaded func(error) error
	changed    func(State)

	mu       sync.Mutex
	state    State // guarded by mu
	inRow    int   // latest probes with the same outcome, patient failures twice; guarded by mu
	quick    int   // latest probes that succeeded in time; guarded by mu
	patient  bool  // whether the next probe is patient; guarded by mu
	served   bool  // whether the relay has ever served; guarded by mu
	reported bool  // whether changed was called before the relay served; guarded by mu
}

// State is the state of a [SelfCheck].
type State struct {
	// Serving is the decision. Only several probes in a row change it.
	Serving bool

	// Took and Err are the duration and the error of the latest probe.
	Took time.Duration
	Err  error

	// Overload is why the relay is slow or cannot be checked, though it serves clients.
	// It is nil otherwise.
	Overload error

	// Failures is the number of failed probes since the start.
	Failures uint64
}

// NewSelfCheck returns a self-check in the state not serving. overloaded judges the
// error of a probe: it returns the overload that explains it, or nil for a fault. An
// overload ends no serving. changed is called from one goroutine when serving or an
// overload begins or ends, and once if the relay never starts to serve.
func NewSelfCheck(probe func(context.Context) (time.Duration, error), overloaded func(error) error, changed func(State)) *SelfCheck {
	return &SelfCheck{probe: probe, overloaded: overloaded, changed: changed, state: State{Err: errUnchecked}}
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
		probing, cancel := context.WithTimeout(ctx, s.timeout())
		took, err := s.probe(probing)
		cancel()
		if ctx.Err() != nil {
			return nil // the probe may have failed because of that
		}
		var overload error
		if err != nil {
			overload = s.overloaded(err)
		} else if took > probeTimeout {
			overload = fmt.Errorf("a packet between two clients took %s", took.Round(100*time.Millisecond))
		}
		changed, state := s.note(took, err, overload)
		if changed {
			s.changed(state)
		}
		wait := recheckAfter
		if state.Serving && state.Err == nil {
			wait = max(checkEvery-time.Since(began), recheckAfter)
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

// timeout is that of the next probe.
func (s *SelfCheck) timeout() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.patient {
		return patientTimeout
	}
	return probeTimeout
}

// note records the outcome of a probe, and reports whether to call changed.
func (s *SelfCheck) note(took time.Duration, err, overload error) (bool, State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if (err == nil) != (s.state.Err == nil) {
		s.inRow = 0
	}
	s.inRow++
	timedOut := errors.Is(err, context.DeadlineExceeded)
	if timedOut && s.patient {
		s.inRow++
	}
	s.patient = timedOut && !s.patient
	s.state.Took, s.state.Err = took, err
	was, wasOverloaded := s.state.Serving, s.state.Overload != nil
	s.noteOverload(err, overload)
	never := false
	switch {
	case err != nil && was && overload != nil:
		s.state.Failures++
		s.inRow = 0 // the failures of an overload do not add up
	case err != nil:
		s.state.Failures++
		s.state.Serving = was && s.inRow < failuresToStop
		never = !s.served && !s.reported && s.inRow >= failuresToStop
		s.reported = s.reported || never
	case !s.served:
		// One success is enough at the start, because every second of
		// the start is a second without a relay.
		s.served, s.state.Serving = true, true
	default:
		s.state.Serving = was || s.inRow >= successesToServe
	}
	if !s.state.Serving {
		s.state.Overload = nil
	}
	return never || s.state.Serving != was || wasOverloaded != (s.state.Overload != nil), s.state
}

// noteOverload updates the overload. A few quick probes end it, or a fault. It holds mu.
func (s *SelfCheck) noteOverload(err, overload error) {
	switch {
	case overload != nil:
		s.quick, s.state.Overload = 0, overload
	case err != nil:
		s.quick = 0
		if !errors.Is(err, context.DeadlineExceeded) {
			s.state.Overload = nil
		}
	default:
		if s.quick++; s.quick >= quickToRecover {
			s.state.Overload = nil
		}
	}
}
