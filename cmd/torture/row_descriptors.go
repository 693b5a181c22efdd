//go:build linux

package main

import (
	"context"
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
		short: true, upstream: true, run: runDescriptors,
	})
}

const (
	newMembers    = 10
	newMemberSoon = 2 * time.Second
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
	if err := wait(ctx, span/4); err != nil {
		return nil, err
	}
	w := l.watch(ctx, r)
	within, slowest, cause := l.joining(ctx, r, source, span/2/newMembers)
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
		promise("a new member gets in within "+newMemberSoon.String(), within == newMembers, "%d of %d, slowest %s%s", within, newMembers, millis(slowest), cause),
		promise("members lose no packet", t.Lost == 0 && t.Disconnected == 0 && t.Sent > 0, "%s", t.loss()),
		strength("connections of strangers", float64(tried), 256*2, ""),
		note("open at once", "%d", open),
	), nil
}

// joining connects new members, one after the other, and returns how many are admitted
// in time. The cause is the error of the first that is not.
func (l *lab) joining(ctx context.Context, r *relay, s *source, every time.Duration) (within int, slowest time.Duration, cause string) {
	done, cancel := context.WithCancel(ctx)
	defer cancel()
	joined := 0
	pace(done, 0, every, func(time.Time) error {
		took, err := l.join(ctx, r, s, netip.AddrFrom4([4]byte{127, 201, 0, byte(1 + joined)}))
		slowest = max(slowest, took)
		switch {
		case err == nil:
			within++
		case cause == "":
			cause = ": " + rootCause(err)
		}
		if joined++; joined == newMembers {
			cancel()
		}
		return nil
	})
	return within, slowest, cause
}

// join connects a member from an address that no client had before. A client that is
// turned away tries again when tailscaled would.
func (l *lab) join(ctx context.Context, r *relay, s *source, from netip.Addr) (time.Duration, error) {
	private := key.NewNode()
	s.admit(true, private.Public())
	begun := time.Now()
	soon, cancel := context.WithTimeout(ctx, newMemberSoon)
	defer cancel()
	retry := backoff.NewBackoff("derp", logger.Discard, newMemberSoon)
	for {
		c, err := testrelay.Dial(soon, r.Target(), private, from)
		if err == nil {
			l.onClose(c.Close)
			return time.Since(begun), nil
		}
		if soon.Err() == nil {
			retry.BackOff(soon, err)
		}
		if soon.Err() != nil {
			return time.Since(begun), err
		}
	}
}
