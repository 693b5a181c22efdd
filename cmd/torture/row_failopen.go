//go:build linux

package main

import (
	"context"
	"time"

	"derpd/internal/testrelay"
)

func init() {
	const failOpen = "with DERP_VERIFY_CLIENT_URL_FAIL_OPEN=true, "
	register(row{
		name: "fail-open-descriptors", short: true, run: failOpenDescriptors,
		attack: failOpen + "256 descriptors are taken by silent connections while 60 strangers connect",
	})
	register(row{
		name: "fail-open-slow", short: true, upstream: true, run: failOpenSlow,
		attack: failOpen + "400 strangers connect, and the URL answers 8 questions at once, each in 1 s, so that others time out",
	})
	register(row{
		name: "fail-open-down", short: true, light: true, run: failOpenDown,
		attack: failOpen + "the URL refuses connections: everybody may connect, which shows that the other rows can fail",
	})
}

const failOpenFor = 12 * time.Second

// failOpen starts a relay that admits everybody while its admission URL is down.
func (l *lab) failOpen(ctx context.Context, s *source, files int) (*relay, error) {
	return l.start(ctx, setup{source: s, files: files, env: []string{"DERP_VERIFY_CLIENT_URL_FAIL_OPEN=true"}, args: []string{"-verify-client-url-fail-open"}})
}

// knock lets strangers connect for a time, from addresses of their own.
func (l *lab) knock(ctx context.Context, r *relay, count int) (tally, error) {
	l.say("%d strangers connect", count)
	a, err := l.attack(ctx, r, load{Kind: "strangers", AtOnce: count, Addresses: count, For: pick(l, failOpenFor, failOpenFor/2)})
	if err != nil {
		return tally{}, err
	}
	return a.wait(ctx)
}

// noneAdmitted are the lines about strangers of whom none may be admitted.
func (t tally) noneAdmitted() []measured {
	return []measured{
		strength("connections of strangers", float64(t.tried()), 200, ""),
		promise("0 strangers are admitted", t.counts["admitted"] == 0, "%d of %d", t.counts["admitted"], t.tried()),
	}
}

func failOpenDescriptors(ctx context.Context, l *lab) ([]measured, error) {
	const files, silent = 256, 225
	s, err := l.newSource(ctx, 0)
	if err != nil {
		return nil, err
	}
	s.answer(50*time.Millisecond, 0)
	s.server.SetKeepAlivesEnabled(false) // each question needs a descriptor
	r, err := l.failOpen(ctx, s, files)
	if err != nil {
		return nil, err
	}
	held := 0
	for i := range silent {
		conn, err := testrelay.DialTCP(ctx, r.HTTPS, attackerAddr(i))
		if err != nil {
			continue
		}
		held++
		l.onClose(func() { _ = conn.Close() })
	}
	t, err := l.knock(ctx, r, 60)
	return append(t.noneAdmitted(), note("silent connections", "%d of %d", held, silent)), err
}

func failOpenSlow(ctx context.Context, l *lab) ([]measured, error) {
	s, err := l.newSource(ctx, 8)
	if err != nil {
		return nil, err
	}
	r, err := l.failOpen(ctx, s, 0)
	if err != nil {
		return nil, err
	}
	s.answer(time.Second, 0)
	t, err := l.knock(ctx, r, 400)
	return t.noneAdmitted(), err
}

func failOpenDown(ctx context.Context, l *lab) ([]measured, error) {
	s, err := l.newSource(ctx, 0)
	if err != nil {
		return nil, err
	}
	r, err := l.failOpen(ctx, s, 0)
	if err != nil {
		return nil, err
	}
	s.stop()
	t, err := l.knock(ctx, r, 20)
	return []measured{promise("strangers are admitted", t.counts["admitted"] > 0, "%d of %d", t.counts["admitted"], t.tried())}, err
}
