//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"

	"derpd/internal/testrelay"
)

// used contains all counters at one moment.
type used struct {
	at           time.Time
	server, load time.Duration // CPU time of each process
	calls        int64         // reads and writes of the server
	machine      time.Duration // CPU time of the whole machine
	count        uint64        // packets, connects or answers
}

// usedBy reads all counters.
func usedBy(s *server, count uint64) (used, error) {
	u := used{at: time.Now(), count: count}
	var errs [4]error
	u.server, errs[0] = testrelay.CPUTime(s.PID)
	u.load, errs[1] = testrelay.CPUTime(0)
	u.calls, errs[2] = testrelay.ReadsAndWrites(s.PID)
	u.machine, errs[3] = machineTime()
	return u, errors.Join(errs[:]...)
}

// observe waits for the warmup and then for d. It returns the difference of the
// counters over d.
func observe(ctx context.Context, s *server, d time.Duration, count func() uint64) (interval, error) {
	if err := testrelay.Wait(ctx, warmup); err != nil {
		return interval{}, err
	}
	before, err := usedBy(s, count())
	if err != nil {
		return interval{}, err
	}
	if err := testrelay.Wait(ctx, d); err != nil {
		return interval{}, err
	}
	after, err := usedBy(s, count())
	return after.since(before), err
}

// observeWith runs observation beside the load in g, and then ends the load with
// cancel. It returns the interval, and a sample with the metrics of the interval.
func observeWith(g *errgroup.Group, cancel func(), s *server, observation func() (interval, error)) (interval, sample, error) {
	var u interval
	g.Go(func() (err error) {
		defer cancel()
		u, err = observation()
		return err
	})
	if err := g.Wait(); err != nil {
		return interval{}, nil, err
	}
	out, err := u.sample(s)
	return u, out, err
}

func (u used) since(before used) interval {
	return interval{
		span:    u.at.Sub(before.at).Seconds(),
		server:  (u.server - before.server).Seconds(),
		load:    (u.load - before.load).Seconds(),
		calls:   float64(u.calls - before.calls),
		count:   float64(u.count - before.count),
		machine: (u.machine - before.machine).Seconds(),
	}
}

// interval is the difference of two [used], in CPU seconds; span is in seconds.
type interval struct {
	span, server, load, machine float64
	calls, count                float64
}

// sample returns a sample with the metrics about the measurement itself.
func (i interval) sample(s *server) (sample, error) {
	if i.count == 0 {
		return nil, fmt.Errorf("no packet, connect or answer within %.1f s", i.span)
	}
	return sample{
		serverBusy: i.server / i.span / shareOf(s.Program),
		loadBusy:   i.load / i.span / shareOf(s.Program),
		othersBusy: max(0, i.machine-i.server-i.load) / i.span / float64(runtime.NumCPU()),
	}, nil
}

// shareOf returns the number of CPUs of the server. The load has the same number.
// Without pinning, both use all CPUs.
func shareOf(p *program) float64 {
	if len(p.CPUs) > 0 {
		return float64(len(p.CPUs))
	}
	return float64(runtime.NumCPU())
}
