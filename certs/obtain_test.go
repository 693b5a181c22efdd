package certs

import (
	"bytes"
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/rs/zerolog"
)

// Attempts follow growing pauses up to a minute, and an hour after a final
// refusal.
func TestRetry(t *testing.T) {
	down := &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	final := certmagic.ErrNoRetry{Err: errors.New("refused")}
	for _, tt := range []struct {
		name     string
		full     bool    // whether the storage has a fault
		outcomes []error // of the attempts; the test ends after the last one
		at       []string
		got      bool
		faults   uint64
		last     string // fault at the end
	}{
		{"at once", false, []error{nil}, []string{"0s"}, true, 0, ""},
		{"later", false, []error{down, down, nil}, []string{"0s", "1s", "3s"}, true, 2, ""},
		{"never", false, slices.Repeat([]error{down}, 9), []string{"0s", "1s", "3s", "7s", "15s", "31s", "1m3s", "2m3s", "3m3s"}, false, 8, "unreachable"},
		// certmagic's event has reported this one.
		{"refused", false, []error{final, final, nil}, []string{"0s", "1h0m0s", "2h0m0s"}, true, 0, ""},
		{"after a full disk", true, []error{down, down, nil}, []string{"0s", "1s", "3s"}, true, 1, "storage"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				a := NewACME(ACMEConfig{Names: []string{"derp.example.com"}, Log: zerolog.Nop()})
				if tt.full {
					a.onWrite(syscall.ENOSPC)
				}
				began := time.Now()
				var at []string
				got := a.retry(ctx, "derp.example.com", func() error {
					outcome := tt.outcomes[len(at)]
					at = append(at, time.Since(began).String())
					if len(at) == len(tt.outcomes) && outcome != nil {
						cancel()
					}
					return outcome
				})
				if got != tt.got || !slices.Equal(at, tt.at) || a.faults.count() != tt.faults {
					t.Errorf("%t after attempts at %q with %d faults, want %t, %q and %d", got, at, a.faults.count(), tt.got, tt.at, tt.faults)
				}
				last := ""
				if fault, ok := errors.AsType[*explained](a.faults.first(a.config.Names)); ok {
					last = fault.kind
				}
				if last != tt.last {
					t.Errorf("the fault at the end is %q, want %q", last, tt.last)
				}
			})
		})
	}
}

// The stop ends a pause.
func TestRetryStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		began := time.Now()
		a := NewACME(ACMEConfig{Log: zerolog.Nop()})
		got := a.retry(ctx, "derp.example.com", func() error { return errors.New("down") })
		if took := time.Since(began); got || took != 1500*time.Millisecond {
			t.Errorf("%t after %s, want the end of the context", got, took)
		}
	})
}

// The stop waits for certmagic, but only 300 ms.
func TestWaitToStop(t *testing.T) {
	for takes, want := range map[time.Duration]time.Duration{
		0: 0, 100 * time.Millisecond: 100 * time.Millisecond, time.Hour: 300 * time.Millisecond,
	} {
		synctest.Test(t, func(t *testing.T) {
			began, timer := time.Now(), time.NewTimer(takes)
			waitToStop(func() { <-timer.C })
			if took := time.Since(began); took != want {
				t.Errorf("certmagic takes %s: waits %s, want %s", takes, took, want)
			}
			<-time.After(takes) // certmagic's end
			synctest.Wait()
		})
	}
}

// Each fault is logged once, until it changes or comes back. The storage's fault
// comes first, and then that of the first name.
func TestFaults(t *testing.T) {
	var log bytes.Buffer
	f := newFaults(zerolog.New(&log))
	names := []string{"a.example.com", "b.example.com"}
	fault := func(kind, words string) *explained { return &explained{kind, words, errors.New(words)} }
	for _, step := range []struct {
		do     func()
		first  string
		logged int
		count  uint64
	}{
		{func() {}, "", 0, 0},
		{func() { f.set("b.example.com", fault("dns", "b at noon")) }, "b at noon", 1, 1},
		{func() { f.set("b.example.com", fault("dns", "b at one")) }, "b at one", 1, 2},
		{func() { f.set("b.example.com", fault("caa", "b at two")) }, "b at two", 2, 3},
		{func() { f.set("a.example.com", fault("caa", "a")) }, "a", 3, 4},
		{func() { f.set(storageFault, fault("storage", "disk")) }, "disk", 4, 5},
		{func() { f.clear("a.example.com") }, "disk", 4, 5},
		{func() { f.clear(storageFault) }, "b at two", 4, 5},
		{func() { f.clear("b.example.com") }, "", 4, 5},
		{func() { f.set("b.example.com", fault("caa", "b at two")) }, "b at two", 5, 6},
	} {
		step.do()
		first := ""
		if err := f.first(names); err != nil {
			first = err.Error()
		}
		if n := strings.Count(log.String(), "certificate not obtained"); first != step.first || n != step.logged || f.count() != step.count {
			t.Errorf("first %q, %d logged, %d counted; want %+v", first, n, f.count(), step)
		}
	}
	if !f.has("b.example.com") || f.has("a.example.com") || f.has(storageFault) {
		t.Error("has is wrong")
	}
}

// certmagic's events change the status. The first name alone makes the manager
// ready.
func TestEvents(t *testing.T) {
	a := NewACME(ACMEConfig{Names: []string{"a.example.com", "b.example.com"}, Log: zerolog.Nop()})
	event := func(name string, data map[string]any) {
		t.Helper()
		if err := a.onEvent(t.Context(), name, data); err != nil {
			t.Error(err)
		}
	}
	is := func(when string, failures, renewals uint64, failed, ready bool) {
		t.Helper()
		closed := false
		select {
		case <-a.Ready():
			closed = true
		default:
		}
		s := a.Status()
		if s.ReloadErrors != failures || s.Reloads != renewals || !errors.Is(s.Err, ErrNone) != failed || closed != ready {
			t.Errorf("%s: %+v, ready %t", when, s, closed)
		}
	}
	is("at first", 0, 0, false, false)
	event("cert_failed", map[string]any{"identifier": "a.example.com", "error": context.Canceled})
	is("stopped", 0, 0, false, false)
	event("cert_failed", map[string]any{"identifier": "a.example.com", "error": errors.New("refused")})
	is("refused", 1, 0, true, false)
	event("cert_obtained", map[string]any{"identifier": "b.example.com", "renewal": false})
	is("another one obtained", 1, 0, true, false)
	event("cert_obtained", map[string]any{"identifier": "a.example.com", "renewal": true})
	is("renewed", 1, 1, false, false)
	event("cached_managed_cert", map[string]any{"sans": []string{"b.example.com"}})
	is("the second name", 1, 1, false, false)
	event("cached_managed_cert", map[string]any{"sans": []string{"a.example.com"}})
	event("cached_managed_cert", map[string]any{"sans": []string{"a.example.com"}})
	is("the first name", 1, 1, false, true)
	a.onWrite(syscall.ENOSPC)
	is("a full disk", 2, 1, true, true)
	a.onWrite(nil)
	is("room on the disk", 2, 1, false, true)
}
