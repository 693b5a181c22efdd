// Package healthz tells whether the relay works, and when it does not, which
// cause comes first. It knows the relay only as a client does: through its
// listeners.
package healthz

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// checkTimeout bounds one round of checks.
	checkTimeout = 4 * time.Second

	// reuse is for how long one round answers every question: nobody can
	// make the relay probe itself more often than this.
	reuse = time.Second
)

// Level is how a check went.
type Level int

// A warning is for the operator; the relay serves all the same.
const (
	OK Level = iota
	Warn
	Fail
)

var levelNames = [...]string{OK: "ok", Warn: "warn", Fail: "fail"}

// String is the level's word in /readyz.
func (l Level) String() string { return levelNames[l] }

// MarshalText gives the level's word to JSON.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// Result is the outcome of one check.
type Result struct {
	Level  Level
	Detail string // one line; for a failure, the cause and its fix
}

// Okf is a Result that is fine.
func Okf(format string, args ...any) Result { return Result{OK, fmt.Sprintf(format, args...)} }

// Warnf is a Result that an operator should know of.
func Warnf(format string, args ...any) Result { return Result{Warn, fmt.Sprintf(format, args...)} }

// Failf is a Result that makes the relay not ready.
func Failf(format string, args ...any) Result { return Result{Fail, fmt.Sprintf(format, args...)} }

// Check is one thing that must hold.
type Check struct {
	Name string
	Run  func(context.Context) Result
}

// Report is one round of checks, in the order of their causes: the first
// failure explains the later ones.
type Report struct {
	Ready  bool    `json:"ready"`
	Cause  string  `json:"cause,omitempty"` // the first failure
	Checks []Named `json:"checks"`
}

// Named is the result of the check with that name.
type Named struct {
	Name   string `json:"name"`
	Level  Level  `json:"level"`
	Detail string `json:"detail"`
}

// Health runs the checks.
type Health struct {
	checks []Check

	mu       sync.Mutex
	last     Report    // guarded by mu
	lastDone time.Time // when last was made; guarded by mu

	// stopping is not under mu: the stop must not wait for a check.
	stopping atomic.Bool
}

// New returns the health of what the checks look at. Their order is the order
// of causes: a listener comes before what answers on it.
func New(checks []Check) *Health { return &Health{checks: checks} }

// Changed forgets the last report: what it was about is known to have changed.
func (h *Health) Changed() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lastDone = time.Time{}
}

// Stopping makes every later report not ready.
func (h *Health) Stopping() { h.stopping.Store(true) }

// Report runs the checks, or returns what they gave less than a second ago.
func (h *Health) Report(ctx context.Context) Report {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stopping.Load() {
		return Report{Cause: "the relay is stopping"}
	}
	if !h.lastDone.IsZero() && time.Since(h.lastDone) < reuse {
		return h.last
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), checkTimeout)
	defer cancel()

	// Side by side: one check that waits for its timeout must not take the
	// time of the others.
	results := make([]Result, len(h.checks))
	var wg sync.WaitGroup
	for i, c := range h.checks {
		wg.Go(func() { results[i] = c.Run(ctx) })
	}
	wg.Wait()

	report := Report{Ready: true}
	for i, c := range h.checks {
		r := results[i]
		report.Checks = append(report.Checks, Named{c.Name, r.Level, r.Detail})
		if r.Level == Fail && report.Ready {
			report.Ready = false
			report.Cause = c.Name + ": " + r.Detail
		}
	}
	h.last, h.lastDone = report, time.Now()
	return report
}

// Handler serves /livez (the process answers), /readyz (200 or 503; the first
// cause, then a line for each check) and /healthz (the same as JSON).
func (h *Health) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("ok\n"))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		report := h.Report(r.Context())
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(status(report))
		_, _ = w.Write([]byte(report.String()))
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		report := h.Report(r.Context())
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status(report))
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		_ = enc.Encode(report)
	})
	return mux
}

// StatusHandler serves /readyz with the first word alone: the causes name
// addresses and servers, and are not for everybody who can ask.
func (h *Health) StatusHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		report := h.Report(r.Context())
		w.WriteHeader(status(report))
		if report.Ready {
			_, _ = w.Write([]byte("ready\n"))
		} else {
			_, _ = w.Write([]byte("not ready\n"))
		}
	})
	return mux
}

func status(r Report) int {
	if r.Ready {
		return http.StatusOK
	}
	return http.StatusServiceUnavailable
}

// String is what /readyz prints.
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
