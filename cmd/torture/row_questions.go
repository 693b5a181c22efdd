//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

func init() {
	const (
		attack = "800 strangers, each time with a new key, ask without end "
		slow   = "; the admission URL answers 8 questions at once, each in 100 ms"
	)
	register(row{
		name: "questions-url", short: true, timed: true, upstream: true, run: underQuestions(askURL, 1),
		attack: attack + "from one address" + slow,
	})
	register(row{
		name: "questions-url-addresses", run: underQuestions(askURL, askers),
		attack: attack + "from 800 addresses" + slow,
	})
	register(row{
		name: "questions-tailscaled", run: underQuestions(askTailscaled, askers),
		attack: attack + "from 800 addresses; a status of tailscaled takes 5 ms",
	})
}

const (
	askers           = 800
	recheckEvery     = 2 * time.Second
	revokedWithin    = recheckEvery + 5*time.Second
	questionsAllowed = 20 // about strangers, within a second
	giveUpAfter      = 6 * time.Second
	tryAgain         = 100 * time.Millisecond
)

// asked is a source with the setup of a relay that asks it, and the delay of its
// answers under attack.
type asked struct {
	*source
	setup
	delay time.Duration
}

func askURL(ctx context.Context, l *lab) (asked, error) {
	s, err := l.newSource(ctx, 8)
	return asked{source: s, setup: setup{source: s}, delay: 100 * time.Millisecond}, err
}

func askTailscaled(ctx context.Context, l *lab) (asked, error) {
	s, err := l.newSource(ctx, 0)
	if err != nil {
		return asked{}, err
	}
	socket, err := l.tailscaled(ctx, s)
	return asked{
		source: s, delay: 5 * time.Millisecond,
		setup: setup{env: []string{"DERP_VERIFY_CLIENTS=true", "DERP_TAILSCALED_SOCKET=" + socket}},
	}, err
}

// underQuestions lets strangers ask, and meanwhile admits new members and revokes one.
func underQuestions(ask func(context.Context, *lab) (asked, error), addresses int) func(context.Context, *lab) ([]measured, error) {
	return func(ctx context.Context, l *lab) ([]measured, error) {
		a, err := ask(ctx, l)
		if err != nil {
			return nil, err
		}
		a.env = append(a.env, "DERP_VERIFY_INTERVAL="+recheckEvery.String())
		a.setOpen(true) // for the client that waits for the start
		r, err := l.start(ctx, a.setup)
		if err != nil {
			return nil, err
		}
		a.setOpen(false)
		m, err := l.members(ctx, r, a.source, memberCount)
		if err != nil {
			return nil, err
		}
		leaver := key.NewNode()
		a.admit(true, leaver.Public())
		leaves, err := testrelay.Dial(ctx, r.Target(), leaver, memberAddr(memberCount))
		if err != nil {
			return nil, err
		}

		a.answer(a.delay, 0)
		begun := time.Now()
		strangers, err := l.attack(ctx, r, load{Kind: "strangers", AtOnce: askers, Addresses: addresses})
		if err != nil {
			return nil, err
		}
		if err := testrelay.Wait(ctx, 3*time.Second); err != nil {
			return nil, err
		}
		l.say("the strangers ask")
		m.begin()
		joined, err := l.joining(ctx, r, a.source, pick(l, time.Second, 300*time.Millisecond))
		if err != nil {
			return nil, err
		}
		l.say("a member is revoked")
		a.admit(false, leaver.Public())
		gone := endsAfter(leaves, time.Now(), revokedWithin+giveUpAfter)
		questions := slices.DeleteFunc(a.asked(begun, false), func(q question) bool { return q.who == leaver.Public() })
		lasted := time.Since(begun)
		t, err := strangers.stop()
		if err != nil {
			return nil, err
		}
		seen, err := m.end(ctx)
		if err != nil {
			return nil, err
		}
		return []measured{
			strength("connections of strangers a second", float64(t.tried())/lasted.Seconds(), 200, ""),
			joined,
			l.timely(promise(fmt.Sprintf("a revoked member is gone within DERP_VERIFY_INTERVAL + 5 s, %v", revokedWithin), gone <= revokedWithin, "%s", atMost(gone, revokedWithin+giveUpAfter))),
			l.timely(promise(fmt.Sprintf("at most %d questions about strangers within a second", questionsAllowed), mostPerSecond(questions) <= questionsAllowed,
				"%d, %.1f on average", mostPerSecond(questions), float64(len(questions))/lasted.Seconds())),
			promise("no stranger is admitted", t.counts["admitted"] == 0, "%d", t.counts["admitted"]),
			l.loseNothing(seen),
		}, nil
	}
}

// endsAfter returns how long a connection lives from a time on, or limit.
func endsAfter(c *testrelay.Client, from time.Time, limit time.Duration) time.Duration {
	defer c.Close()
	_ = c.Conn.SetReadDeadline(from.Add(limit))
	for {
		if _, err := c.Reader.Discard(1); errors.Is(err, os.ErrDeadlineExceeded) {
			return limit
		} else if err != nil {
			return time.Since(from)
		}
	}
}

// atMost prints a time that was measured up to a limit.
func atMost(d, limit time.Duration) string {
	if d >= limit {
		return fmt.Sprintf("not within %.0f s", limit.Seconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
