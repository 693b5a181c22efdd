//go:build linux

package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"derpd/internal/testrelay"
)

func init() {
	register(row{
		name: "bigframes", attack: "3 waves of 2,000 connections whose first frame claims 256 KiB and has 37 bytes",
		short: true, upstream: true, run: runBigFrames,
	})
}

// bigFramesAdd is what such frames may add to the memory that the same waves use when
// their frames claim the size of a real one.
const bigFramesAdd = 10 << 20

func runBigFrames(ctx context.Context, l *lab) ([]measured, error) {
	r, err := l.start(ctx, setup{})
	if err != nil {
		return nil, err
	}
	waves, connections := pick(l, 3, 2), pick(l, 2000, 500)
	wave := func(bytes int) (peak, sent int64, err error) {
		watch := r.watchMemory(ctx)
		defer func() { peak = watch() }()
		a, err := l.attack(ctx, r, load{
			Kind: "hold", Stage: silentFrame, Frame: bytes, Connections: connections, AtOnce: connections,
			Addresses: 1000, Hold: pick(l, 8*time.Second, 2*time.Second), For: 20 * time.Second,
		})
		if err != nil {
			return 0, 0, err
		}
		t, err := a.wait(ctx)
		return 0, t.counts["opened"], err
	}
	const real, big = 300, 256 << 10
	var usual, claimed int64
	for range waves {
		peak, _, err := wave(real)
		if err != nil {
			return nil, err
		}
		usual = max(usual, peak)
	}
	l.say("waves with real sizes: %d MB", usual>>20)
	var sent int64
	for range waves {
		peak, n, err := wave(big)
		if err != nil {
			return nil, err
		}
		claimed, sent = max(claimed, peak), sent+n
		l.say("wave with big sizes: %d MB", peak>>20)
	}
	if err := r.died(); err != nil {
		return nil, err
	}
	return []measured{
		promise(fmt.Sprintf("memory grows by less than %d MB", bigFramesAdd>>20), claimed-usual < bigFramesAdd,
			"%s, to %d MB", megabytes(claimed-usual), claimed>>20),
		strength("frames", float64(sent), float64(waves*connections), ""),
	}, nil
}

const memoryEvery = 200 * time.Millisecond

// watchMemory begins to watch a server's resident memory. The function that it returns
// ends that, and returns the highest value.
func (r *relay) watchMemory(ctx context.Context) func() int64 {
	ctx, cancel := context.WithCancel(ctx)
	var highest int64
	var done sync.WaitGroup
	done.Go(func() {
		pace(ctx, 0, memoryEvery, func(time.Time) error {
			bytes, err := testrelay.ResidentBytes(r.PID)
			highest = max(highest, bytes)
			return err
		})
	})
	return func() int64 {
		cancel()
		done.Wait()
		return highest
	}
}
