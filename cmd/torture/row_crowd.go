//go:build linux

package main

import (
	"context"
	"fmt"
	"time"
)

func init() {
	register(row{
		name: "crowd", attack: "50,000 silent connections, 12,000 of them at once, from 1,000 addresses, within 128 MB",
		upstream: true,
		run: func(ctx context.Context, l *lab) ([]measured, error) {
			return runCrowd(ctx, l, 128<<20, load{
				Kind: "hold", Stage: silentTCP, Hold: 20 * time.Second, For: time.Minute,
				Connections: 50_000, AtOnce: 12_000, Addresses: 1000, Rate: 2000,
			})
		},
	})
	for _, limit := range []int64{64, 128, 256} {
		register(row{
			name: fmt.Sprintf("silent-%d", limit), attack: fmt.Sprintf("9,000 silent TLS connections from 1,000 addresses, within %d MB", limit),
			short: limit == 64, timed: true, upstream: true,
			run: func(ctx context.Context, l *lab) ([]measured, error) {
				// No address opens more than another. Each is held to the end.
				return runCrowd(ctx, l, limit<<20, load{
					Kind: "hold", Stage: silentTLS, Connections: pick(l, 9000, 3000), AtOnce: pick(l, 9000, 3000), Addresses: 1000,
					Rate: pick[float64](l, 300, 500), Hold: pick(l, 40*time.Second, 7*time.Second), For: pick(l, 45*time.Second, 9*time.Second),
				})
			},
		})
	}
}

// runCrowd sends a crowd of strangers to a server with a limit of memory.
func runCrowd(ctx context.Context, l *lab, memory int64, what load) ([]measured, error) {
	source, err := l.newSource(ctx, 0)
	if err != nil {
		return nil, err
	}
	r, err := l.start(ctx, setup{source: source, memory: memory})
	if err != nil {
		return nil, err
	}
	m, err := l.members(ctx, r, source, memberCount)
	if err != nil {
		return nil, err
	}
	s, err := l.besiege(ctx, r, m, what)
	if err != nil {
		return nil, err
	}
	held, err := r.memory(memory)
	if err != nil {
		return nil, err
	}
	lines := append(s.promises(l), held...)
	return append(lines,
		note("open at once", "%d of %d", s.tally.counts["open"], what.AtOnce),
		strength("connections", float64(s.tally.counts["tried"]), float64(what.Connections), "")), nil
}
