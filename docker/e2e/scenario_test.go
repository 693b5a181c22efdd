//go:build e2e

package e2e

import (
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"
)

// scenario is a row of the table: what derpd promises, as its peers see it.
type scenario struct {
	name string
	long bool // left out by -short
	run  func(*testing.T, *row)
}

// scenarios are all there are, in the order of the table.
func scenarios() []scenario {
	return []scenario{
		{"bridge", false, bridge},
		{"other-ports", false, otherPorts},
		{"host", false, host},
		{"pinned", false, pinned},
		{"acme-http", false, acmeHTTP},
		{"acme-tls-alpn", false, acmeTLSALPN},
		{"manual-replaced", false, manualReplaced},
		{"stun-follows-tls", false, stunFollowsTLS},
		{"admit-headscale", false, admitHeadscale},
		{"admit-keys", false, admitKeys},
		{"admit-sidecar", false, admitSidecar},
		{"dual-stack", false, dualStack},
		{"ipv6-only", false, ipv6Only},
		{"wrong-stun", false, wrongSTUN},
		{"captive-portal", false, captivePortal},
		{"haproxy", false, behindHAProxy},
		{"nginx", false, behindNginx},
		{"mesh", false, mesh},
		{"outage", false, outageOnce},
		{"outage-median", true, outageMedian},
		{"update", true, update},
		{"bad-update", true, badUpdate},
	}
}

// TestScenarios runs the table, which TestMain prints.
func TestScenarios(t *testing.T) {
	list := scenarios()
	if os.Getenv(brokenVariable) != "" {
		list = brokenScenarios()
	}
	for _, s := range list {
		t.Run(s.name, func(t *testing.T) {
			if s.long && testing.Short() {
				t.Skip("a long one: make e2e-all")
			}
			r := rows.add(s.name)
			// The first to be registered, so that it comes after all that the
			// scenario itself cleans up.
			t.Cleanup(func() { r.end(t) })
			defer func() {
				if p := recover(); p != nil {
					t.Errorf("panic: %v\n%s", p, debug.Stack())
				}
			}()
			s.run(t, r)
		})
	}
}

// row is the outcome of a scenario.
type row struct {
	name    string
	started time.Time

	mu      sync.Mutex
	seen    []string      // by the peers; guarded by mu
	verdict string        // empty while it runs; guarded by mu
	took    time.Duration // guarded by mu
}

// saw notes what is worth telling, for people who read the table.
func (r *row) saw(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, fmt.Sprintf(format, args...))
}

func (r *row) end(t *testing.T) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.took = time.Since(r.started)
	switch {
	case t.Failed():
		r.verdict = "FAILED"
	case t.Skipped():
		r.verdict = "skipped"
	default:
		r.verdict = "passed"
	}
}

// table is the rows that were begun.
type table struct {
	mu   sync.Mutex
	rows []*row // guarded by mu
}

var rows table

func (t *table) add(name string) *row {
	r := &row{name: name, started: time.Now()}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rows = append(t.rows, r)
	return r
}

// print writes the table, if there is one.
func (t *table) print(w io.Writer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.rows) == 0 {
		return
	}
	out := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(out, "\nSCENARIO\tVERDICT\tSECONDS\tSEEN")
	failed := 0
	for _, r := range t.rows {
		r.mu.Lock()
		verdict, seen := r.verdict, slices.Clone(r.seen)
		took := r.took
		r.mu.Unlock()
		if verdict == "" {
			verdict, took = "UNFINISHED", time.Since(r.started)
		}
		if verdict != "passed" && verdict != "skipped" {
			failed++
		}
		_, _ = fmt.Fprintf(out, "%s\t%s\t%.1f\t%s\n", r.name, verdict, took.Seconds(), strings.Join(seen, "; "))
	}
	_ = out.Flush()
	_, _ = fmt.Fprintf(w, "%d scenarios, %d failed\n", len(t.rows), failed)
}
