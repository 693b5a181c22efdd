// Package healthz reports whether the relay is ready, and if not, the first
// cause. It checks the relay as a client does, through the listeners.
//
// healthz.go runs the checks and keeps their results. http.go serves the report.
// selfcheck.go repeats a probe and decides whether the relay serves clients.
// probe.go has the probes of DERP and STUN. verdict.go judges a certificate as clients
// do: by the pin of the DERP map, or by its chain (chain.go).
//
// The checks themselves are the program's: cmd/derpd/internal/node/checks.go. A
// new check is one function and one line there.
package healthz

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"derpd/internal/redact"
)

const (
	// checkTimeout limits one round of checks.
	checkTimeout = 4 * time.Second

	// reuse is the time for which a report answers further requests. It limits
	// how often strangers can start a probe.
	reuse = time.Second
)

// Level is the outcome of a check.
type Level int

// The levels of a result. Only Fail makes the relay not ready. Warn needs an action
// of the operator.
const (
	OK Level = iota
	Warn
	Fail
)

var levelNames = [...]string{OK: "ok", Warn: "warn", Fail: "fail"}

// String returns the level as /readyz prints it.
func (l Level) String() string { return levelNames[l] }

// MarshalText returns the level as /healthz prints it.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// Result is the result of one check.
type Result struct {
	Name   string `json:"name"` // of the check; set by [Health.Report]
	Level  Level  `json:"level"`
	Detail string `json:"detail"` // one line; for a failure, the cause and its fix
}

// Okf returns a result of level OK.
func Okf(format string, args ...any) Result {
	return Result{Level: OK, Detail: fmt.Sprintf(format, args...)}
}

// Warnf returns a result of level Warn.
func Warnf(format string, args ...any) Result {
	return Result{Level: Warn, Detail: fmt.Sprintf(format, args...)}
}

// Failf returns a result of level Fail.
func Failf(format string, args ...any) Result {
	return Result{Level: Fail, Detail: fmt.Sprintf(format, args...)}
}

// Check is one condition of readiness. Run must return soon after its context
// ends.
type Check struct {
	Name string
	Run  func(context.Context) Result
}

// Report holds the results of one round of checks. The order is that of causes:
// the first failure explains the later ones.
type Report struct {
	Ready  bool     `json:"ready"`
	Cause  string   `json:"cause,omitempty"` // the first failure
	Checks []Result `json:"checks"`
}

// Health runs the checks.
type Health struct {
	checks []Check

	// changes counts the calls of Changed. mu does not guard changes and
	// stopping: Report holds mu during a round, and Changed must not wait.
	changes  atomic.Uint64
	stopping atomic.Bool

	mu          sync.Mutex
	last        Report    // guarded by mu
	lastDone    time.Time // end of the last round, zero before the first; guarded by mu
	lastChanges uint64    // changes at the start of the last round; guarded by mu
}

// New returns the health of the checks. Their order is the order of causes: a
// listener before the service behind it.
func New(checks []Check) *Health { return &Health{checks: checks} }

// Changed makes the next Report run the checks again, because the state of the
// relay has changed. It never waits, and may be called during a round.
func (h *Health) Changed() { h.changes.Add(1) }

// Stopping makes every later report not ready. It never waits.
func (h *Health) Stopping() { h.stopping.Store(true) }

// Report runs the checks, or returns the results of the last second. Callers
// share a round, so the end of ctx does not end it.
func (h *Health) Report(ctx context.Context) Report {
	if !h.stopping.Load() {
		report := h.shared(context.WithoutCancel(ctx))
		if !h.stopping.Load() {
			return report
		}
	}
	return Report{Cause: "the relay is stopping", Checks: []Result{}}
}

// shared returns the last report, or that of a new round.
func (h *Health) shared(ctx context.Context) Report {
	h.mu.Lock()
	defer h.mu.Unlock()
	changes := h.changes.Load()
	if time.Since(h.lastDone) >= reuse || h.lastChanges != changes {
		h.last, h.lastChanges = h.round(ctx), changes
		h.lastDone = time.Now()
	}
	return h.last
}

// round runs the checks at the same time, so that a check which waits for its
// timeout leaves enough time for the others.
func (h *Health) round(ctx context.Context) Report {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	results := make([]Result, len(h.checks))
	var wg sync.WaitGroup
	for i, c := range h.checks {
		wg.Go(func() {
			results[i] = c.Run(ctx)
			results[i].Name = c.Name
			results[i].Detail = redact.Secrets(results[i].Detail)
		})
	}
	wg.Wait()

	report := Report{Ready: true, Checks: results}
	for _, r := range results {
		if r.Level == Fail {
			report.Ready, report.Cause = false, r.Name+": "+r.Detail
			break
		}
	}
	return report
}

// String returns the report as /readyz prints it.
func (r Report) String() string {
	var b strings.Builder
	if r.Ready {
		b.WriteString("ready\n")
	} else {
		fmt.Fprintf(&b, "not ready: %s\n", r.Cause)
	}
	for _, c := range r.Checks {
		fmt.Fprintf(&b, "%-4s %s: %s\n", c.Level, c.Name, c.Detail)
	}
	return b.String()
}
