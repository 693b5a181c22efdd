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

// scenario is a row of the table: one promise of derpd, checked by its peers.
type scenario struct {
	name string
	when when
	run  func(*testing.T, *row)
}

// when is whether other scenarios may run at the same time.
type when int

const (
	beside when = iota // others may run at the same time
	alone              // none may: it measures time or uses ports of this machine
	long               // as alone, and skipped by -short
)

// scenarios returns all scenarios in the order of the table.
func scenarios() []scenario {
	return []scenario{
		{"bridge", alone, bridge},
		{"other-ports", alone, otherPorts},
		{"host", alone, host},
		{"pinned", beside, pinned},
		{"acme-http", beside, acmeHTTP},
		{"acme-tls-alpn", beside, acmeTLSALPN},
		{"manual-replaced", alone, manualReplaced},
		{"stun-follows-tls", beside, stunFollowsTLS},
		{"admit-headscale", beside, admitHeadscale},
		{"admit-keys", beside, admitKeys},
		{"admit-sidecar", alone, admitSidecar},
		{"dual-stack", beside, dualStack},
		{"ipv6-only", beside, ipv6Only},
		{"wrong-stun", beside, wrongSTUN},
		{"captive-portal", beside, captivePortal},
		{"haproxy", beside, behindHAProxy},
		{"nginx", beside, behindNginx},
		{"mesh", beside, mesh},
		{"outage", alone, outageOnce},
		{"outage-median", long, outageMedian},
		{"archive", beside, archive},
		{"published", long, published},
		{"update-once", alone, updateOnce},
		{"update", long, update},
		{"bad-update", long, badUpdate},
	}
}

// TestScenarios runs the table, which TestMain prints.
func TestScenarios(t *testing.T) {
	list := scenarios()
	if os.Getenv(brokenVariable) != "" {
		list = brokenScenarios()
	}
	for i, s := range list {
		t.Run(s.name, func(t *testing.T) {
			if s.when == long && testing.Short() {
				t.Skip("takes long; run make e2e-all")
			}
			if s.when == beside {
				t.Parallel()
			}
			r := rows.add(s.name, i)
			// Registered first, so that it runs after the scenario's own cleanup.
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
	place   int // position in the table
	started time.Time

	mu      sync.Mutex
	seen    []string      // observations of the peers; guarded by mu
	verdict string        // empty while the scenario runs; guarded by mu
	took    time.Duration // guarded by mu
}

// saw adds an observation to the row.
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

// table holds the rows of the scenarios that have started.
type table struct {
	mu   sync.Mutex
	rows []*row // guarded by mu
}

var rows table

func (t *table) add(name string, place int) *row {
	r := &row{name: name, place: place, started: time.Now()}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rows = append(t.rows, r)
	return r
}

// print writes the table, or nothing without rows.
func (t *table) print(w io.Writer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.rows) == 0 {
		return
	}
	out := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(out, "\nSCENARIO\tVERDICT\tSECONDS\tSEEN")
	failed := 0
	slices.SortFunc(t.rows, func(a, b *row) int { return a.place - b.place })
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
