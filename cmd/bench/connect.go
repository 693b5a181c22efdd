//go:build linux

package main

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

const (
	connectors = 16
	// keysInTurn is the number of node keys that connect in turn. The number is
	// large, so that a key's connection has ended before its next one begins.
	keysInTurn = 4096

	settle     = 2 * time.Second // wait before memory is measured
	spareFiles = 100             // open files besides the connections
)

// source returns the loopback address of a connection. Every hundred connections
// share one. An address has some tens of thousands of ports, and a used port is free
// only after a minute.
func source(i int) netip.Addr {
	i /= 100
	return netip.AddrFrom4([4]byte{127, 1, byte(i / 250), byte(1 + i%250)})
}

// connects measures clients that connect, and disconnect once they are accepted.
type connects struct {
	time time.Duration
	keys []key.NodePrivate
	made atomic.Int64 // number of connections, which selects key and address
}

func newConnects(d time.Duration) *connects {
	c := &connects{time: d}
	for range keysInTurn {
		c.keys = append(c.keys, key.NewNode())
	}
	return c
}

func (c *connects) measure(ctx context.Context, s *server) (sample, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var done atomic.Uint64
	g, gctx := errgroup.WithContext(ctx)
	for range connectors {
		g.Go(func() error {
			for gctx.Err() == nil {
				i := int(c.made.Add(1))
				client, err := dial(gctx, s, c.keys[i%len(c.keys)], source(i%(250*250*100)), false)
				if err != nil {
					return ended(gctx, err)
				}
				client.close()
				done.Add(1)
			}
			return nil
		})
	}
	u, out, err := observeWith(g, cancel, s, func() (interval, error) {
		return observe(gctx, s, c.time, done.Load)
	})
	if err != nil {
		return nil, err
	}
	out[connectRate] = u.count / u.span
	out[cpuPerConnect] = u.server / u.count * 1e3
	return out, nil
}

// measureIdle measures the memory that each idle client adds to a server. It starts
// a new server, because memory of earlier measurements would count.
func measureIdle(ctx context.Context, p *program, count int, settle time.Duration) (sample, error) {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return nil, err
	}
	if files.Cur < uint64(count+spareFiles) {
		return nil, fmt.Errorf("limit of open files: too low for %d connections (got %d); raise it with ulimit -n", count, files.Cur)
	}
	s, err := p.Start(ctx)
	if err != nil {
		return nil, err
	}
	defer s.Stop()
	if err := testrelay.Wait(ctx, settle); err != nil {
		return nil, err
	}
	before, err := testrelay.ResidentBytes(s.PID)
	if err != nil {
		return nil, err
	}

	clients := make([]*client, count)
	defer func() {
		for _, c := range clients {
			if c != nil {
				c.close()
			}
		}
	}()
	var next atomic.Int64
	g, gctx := errgroup.WithContext(ctx)
	for range connectors {
		g.Go(func() error {
			for {
				i := int(next.Add(1)) - 1
				if i >= count {
					return nil
				}
				var err error
				if clients[i], err = dial(gctx, s, key.NewNode(), source(i), false); err != nil {
					return fmt.Errorf("connection %d of %d: %w", i+1, count, err)
				}
			}
		})
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("%w%s", err, s.LastWords())
	}
	if err := testrelay.Wait(ctx, settle); err != nil {
		return nil, err
	}
	after, err := testrelay.ResidentBytes(s.PID)
	if err != nil {
		return nil, err
	}
	runtime.KeepAlive(clients)
	return sample{
		memoryPerClient: float64(after-before) / float64(count) / 1024,
		memoryAlone:     float64(before) / (1 << 20),
	}, nil
}

// measureStart measures the time from the execution of a program to the first DERP
// handshake and to the first STUN answer. The key and the certificate exist before.
func measureStart(ctx context.Context, p *program, times int) (sample, error) {
	var derps, stuns []time.Duration
	for range times {
		begin := time.Now()
		s, err := p.Launch(ctx)
		if err != nil {
			return nil, err
		}
		err = s.AwaitDERP(ctx)
		derps = append(derps, time.Since(begin))
		if err == nil {
			err = s.AwaitSTUN(ctx)
			stuns = append(stuns, time.Since(begin))
		}
		if err != nil {
			err = fmt.Errorf("%w%s", err, s.LastWords())
		}
		s.Stop()
		if err != nil {
			return nil, err
		}
	}
	slices.Sort(derps)
	slices.Sort(stuns)
	return sample{
		startDERP: quantile(derps, 0.5).Seconds() * 1e3,
		startSTUN: quantile(stuns, 0.5).Seconds() * 1e3,
	}, nil
}
