//go:build linux

package main

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"derpd/internal/testrelay"
)

// arrive counts a packet that was sent in a phase some time ago.
func (m *members) arrive(number uint64, ago time.Duration) {
	b := make([]byte, stampLen)
	stamp(b, number, time.Now().Add(-ago))
	m.got(b, func(p *phase, delay time.Duration) {
		p.delays = append(p.delays, delay)
		p.gotten.Add(1)
	})
}

// A packet belongs to the phase in which it was sent, and is lost when it has not arrived
// some time after the phase.
func TestPhases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &members{}
		m.begin()
		first, _ := m.now()
		first.sent.Add(3)
		m.arrive(0, time.Millisecond)
		m.arrive(7, 0) // no such phase
		m.ended.Add(1)
		m.begin()
		second, number := m.now()
		second.sent.Add(2)
		m.arrive(0, 20*time.Millisecond)
		m.ended.Add(2)
		go func() {
			_ = testrelay.Wait(t.Context(), lateAfter/2)
			m.arrive(number, 3*time.Millisecond)
			m.arrive(number, 5*time.Millisecond)
		}()
		begun := time.Now()
		got, err := m.end(t.Context())
		if want := (traffic{Sent: 2, Disconnected: 2, P50: 5 * time.Millisecond, P99: 5 * time.Millisecond, Max: 5 * time.Millisecond}); err != nil || got != want {
			t.Errorf("second phase: %+v, %v; want %+v", got, err, want)
		}
		if took := time.Since(begun); took < lateAfter/2 || took >= lateAfter {
			t.Errorf("the end took %v, want about %v", took, lateAfter/2)
		}

		third, number := m.now()
		third.sent.Add(5)
		m.arrive(number, 0)
		begun = time.Now()
		if got, err = m.end(t.Context()); err != nil || got.Lost != 4 || got.Sent != 5 || got.Disconnected != 0 {
			t.Errorf("third phase: %+v, %v; want 4 of 5 lost", got, err)
		}
		if took := time.Since(begun); took < lateAfter {
			t.Errorf("packets were lost after %v, want %v", took, lateAfter)
		}
		if lost := first.sent.Load() - first.gotten.Load(); lost != 1 {
			t.Errorf("%d packets of the first phase are lost, want 1", lost)
		}
	})
}

// A stall delays the calls that follow, and drops none.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		var due, called []time.Duration
		pace(t.Context(), 50*time.Millisecond, 100*time.Millisecond, func(at time.Time) error {
			due, called = append(due, at.Sub(begun)), append(called, time.Since(begun))
			switch len(due) {
			case 2:
				_ = testrelay.Wait(t.Context(), 230*time.Millisecond)
			case 5:
				return errors.New("enough")
			}
			return nil
		})
		ms := time.Millisecond
		for i, want := range [][2]time.Duration{{50 * ms, 50 * ms}, {150 * ms, 150 * ms}, {250 * ms, 380 * ms}, {350 * ms, 380 * ms}, {450 * ms, 450 * ms}} {
			if due[i] != want[0] || called[i] != want[1] {
				t.Errorf("call %d is due at %v and comes at %v, want %v", i, due[i], called[i], want)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		pace(ctx, 0, time.Second, func(time.Time) error {
			t.Error("called after the end")
			return nil
		})
	})
}

// The rate of an attack is that of its starts, and an attack without a number of
// connections ends with its context.
func TestEach(t *testing.T) {
	var c counts
	begun := time.Now()
	if err := (load{Connections: 50, Rate: 1000}).each(t.Context(), 4, func(_ context.Context, i int) error {
		c.add("n", 1)
		c.highest("last", int64(i))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if got := c.snapshot(); got["n"] != 50 || got["last"] != 49 {
		t.Errorf("%v, want 50 calls up to 49", got)
	}
	if took := time.Since(begun); took < 49*time.Millisecond {
		t.Errorf("50 starts at 1000 a second took %v", took)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if err := (load{}).each(ctx, 2, func(context.Context, int) error {
		cancel()
		return nil
	}); err != nil {
		t.Errorf("an attack that ends: %v", err)
	}
}
