//go:build linux

package main

import (
	"context"
	"time"
)

func init() {
	register(row{
		name: "hellos", attack: "3,000 ClientHellos a second, 1,000 in flight, from 1,000 addresses",
		short: true, timed: true, upstream: true, run: runHellos,
	})
}

func runHellos(ctx context.Context, l *lab) ([]measured, error) {
	source, err := l.newSource(ctx, 0)
	if err != nil {
		return nil, err
	}
	r, err := l.start(ctx, setup{source: source})
	if err != nil {
		return nil, err
	}
	m, err := l.members(ctx, r, source, memberCount)
	if err != nil {
		return nil, err
	}
	const rate, atOnce = 3000, 1000
	s, err := l.besiege(ctx, r, m, load{
		Kind: "hellos", Rate: rate, AtOnce: atOnce, Addresses: 1000, For: pick(l, time.Minute, 10*time.Second),
	})
	if err != nil {
		return nil, err
	}
	return append(s.promises(l), strength("hellos", s.tally.perSecond("tried"), rate, " a second")), nil
}
