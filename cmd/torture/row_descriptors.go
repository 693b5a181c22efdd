//go:build linux

package main

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"tailscale.com/types/key"
	"tailscale.com/types/logger"
	"tailscale.com/util/backoff"

	"derpd/internal/testrelay"
)

func init() {
	register(row{
		name: "descriptors", attack: "ulimit -n 256, and strangers who take all places at every stage at once",
		short: true, timed: true, upstream: true, run: runDescriptors,
	})
}

const (
	newMembers    = 10
	newMemberSoon = 2 * time.Second
	newMemberEver = 6 * time.Second // then it gives up
)

func runDescriptors(ctx context.Context, l *lab) ([]measured, error) {
	source, err := l.newSource(ctx, 0)
	if err != nil {
		return nil, err
	}
	r, err := l.start(ctx, setup{source: source, files: 256})
	if err != nil {
		return nil, err
	}
	const few = 20 // the other descriptors are there to be fought for
	m, err := l.members(ctx, r, source, few)
	if err != nil {
		return nil, err
	}
	m.begin()
	span := pick(l, time.Minute, 12*time.Second)
	var assaults []*assault
	stages := []string{silentTCP, silentTLS, silentKeepalive, silentDERP}
	const each = 150 // more than there are descriptors, for every stage alone
	for i, stage := range stages {
		a, err := l.attack(ctx, r, load{
			Kind: "hold", Stage: stage, AtOnce: each, Addresses: 50, FirstAddr: 50 * i, Rate: 100, For: span,
		})
		if err != nil {
			return nil, err
		}
		assaults = append(assaults, a)
	}
	l.say("strangers take all they can")
	if err := testrelay.Wait(ctx, span/4); err != nil {
		return nil, err
	}
	w, err := l.watch(ctx, r)
	if err != nil {
		return nil, err
	}
	joined, err := l.joining(ctx, r, source, span/2/newMembers)
	if err != nil {
		return nil, err
	}
	var tried, open int64
	for _, a := range assaults {
		t, err := a.wait(ctx)
		if err != nil {
			return nil, err
		}
		tried += t.counts["tried"]
		open += t.counts["open"]
	}
	seen := w.stop()
	t, err := m.end(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.died(); err != nil {
		return nil, err
	}
	lines := seen.promises(l)
	return append(lines,
		joined,
		l.loseNothing(t),
		strength("connections of strangers", float64(tried), 256*2, ""),
		note("open at once", "%d", open),
	), nil
}

// joining connects new members, one after the other, and returns the line about the time
// that each needs.
func (l *lab) joining(ctx context.Context, r *relay, s *source, every time.Duration) (measured, error) {
	own, err := l.measureMachine(ctx)
	if err != nil {
		return measured{}, err
	}
	done, cancel := context.WithCancel(ctx)
	defer cancel()
	joined, within := 0, 0
	var slowest time.Duration
	cause := ""
	pace(done, 0, every, func(time.Time) error {
		took, refusals, err := l.join(ctx, r, s, netip.AddrFrom4([4]byte{127, 201, 0, byte(1 + joined)}))
		slowest = max(slowest, took)
		if err == nil && took < newMemberSoon {
			within++
		} else if cause == "" {
			cause = fmt.Sprintf(": %d refusals", len(refusals))
			if len(refusals) > 0 {
				cause += ", the last: " + rootCause(refusals[len(refusals)-1])
			}
		}
		if joined++; joined == newMembers {
			cancel()
		}
		return nil
	})
	return l.timely(soon("a new member gets in within "+newMemberSoon.String(), newMemberSoon, slowest, own.stop(),
		"%d of %d, slowest %s%s", within, newMembers, millis(slowest), cause)), nil
}

// join connects a member from an address that no client had before. A client that is
// turned away tries again when tailscaled would. It returns the errors of all refusals,
// and the last one if it never got in.
func (l *lab) join(ctx context.Context, r *relay, s *source, from netip.Addr) (took time.Duration, refusals []error, err error) {
	private := key.NewNode()
	s.admit(true, private.Public())
	begun := time.Now()
	ctx, cancel := context.WithTimeout(ctx, newMemberEver)
	defer cancel()
	retry := backoff.NewBackoff("derp", logger.Discard, newMemberSoon)
	for {
		c, err := testrelay.Dial(ctx, r.Target(), private, from)
		if err == nil {
			l.onClose(c.Close)
			return time.Since(begun), refusals, nil
		}
		refusals = append(refusals, err)
		if ctx.Err() == nil {
			retry.BackOff(ctx, err)
		}
		if ctx.Err() != nil {
			return time.Since(begun), refusals, err
		}
	}
}
