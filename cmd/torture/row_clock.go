//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

func init() {
	const year = 365 * 24 * time.Hour
	register(row{
		name: "clock-behind", short: true, light: true, run: wrongClock(-year),
		attack: "the relay starts with a clock a year behind, and its admission URL is down; then the clock is set, and the URL answers",
	})
	register(row{
		name: "clock-ahead", short: true, light: true, run: wrongClock(year),
		attack: "the relay starts with a clock a year ahead, and its admission URL is down; then the clock is set, and the URL answers",
	})
	register(row{
		name: "clock-jumps", light: true, run: clockJumps,
		attack: "the clock of a running relay jumps a year ahead, then two back, then is set",
	})
}

const (
	clockWrongFor = 5 * time.Second
	setWithin     = 10 * time.Second // ready after the clock was set
	clockOrders   = 5                // an authority limits orders
)

// clockSubject is a relay with a certificate of an authority, and a member that its file
// knows. It has run with the right clock.
type clockSubject struct {
	*subject
	clock  *clock
	source *source
	orders func() int64
	member key.NodePrivate
	life   life
	before shown
}

func (l *lab) clockSubject(ctx context.Context) (c clockSubject, err error) {
	c.clock, c.member = new(clock), key.NewNode()
	if c.source, err = l.newSource(ctx, 0); err != nil {
		return c, err
	}
	c.source.admit(true, c.member.Public())
	const httpPort = 80 // of this row's namespace
	ca, env, err := l.authority(90*24*time.Hour, httpPort)
	if err == nil {
		err = ca.Serve(httpPort, 443)
	}
	if err != nil {
		return c, err
	}
	c.orders = ca.Orders.Load
	if c.subject, err = l.subject("data", append(env, "DERP_VERIFY_CLIENT_URL="+c.source.url, "DERP_VERIFY_INTERVAL=1s")...); err != nil {
		return c, err
	}
	if err := l.runUnder(ctx, c.clock, &c.program); err != nil {
		return c, err
	}
	if c.life, _, err = c.start(ctx); err != nil {
		return c, err
	}
	if err := c.life.admits(ctx, c.member); err != nil {
		return c, fmt.Errorf("the member is not admitted: %w", err)
	}
	if err := c.remembers(ctx, c.member.Public()); err != nil {
		return c, err
	}
	c.before, err = c.life.shown(ctx)
	return c, err
}

// wrongClock starts a relay with a wrong clock.
func wrongClock(shift time.Duration) func(ctx context.Context, l *lab) ([]measured, error) {
	return func(ctx context.Context, l *lab) ([]measured, error) {
		c, err := l.clockSubject(ctx)
		if err != nil {
			return nil, err
		}
		c.life.Stop()
		c.source.answer(0, http.StatusServiceUnavailable)
		c.clock.set(shift)
		l.say("the relay starts with a wrong clock")
		if c.life, err = c.launch(ctx); err != nil {
			return nil, err
		}
		text := ""
		told := c.life.until(ctx, "health tells the cause", func(_ int, now string) bool {
			text = now
			return warns(now, "certificate")
		})
		_ = testrelay.Wait(ctx, clockWrongFor)
		known := c.life.admits(ctx, c.member)
		lines := []measured{
			promise("health tells of the certificate's dates", told == nil, "%s", timeOr(0, told)),
			note("meanwhile /readyz says", "%s", lineOf(text, "certificate")),
			note("meanwhile a member that was admitted before is", "%s", refusal(known)),
		}
		return c.afterSet(ctx, l, lines)
	}
}

func clockJumps(ctx context.Context, l *lab) ([]measured, error) {
	c, err := l.clockSubject(ctx)
	if err != nil {
		return nil, err
	}
	stays, err := testrelay.Dial(ctx, testrelay.Target{HTTPS: c.life.HTTPS, Certificate: c.before.leaf}, c.member, netip.Addr{})
	if err != nil {
		return nil, err
	}
	var lines []measured
	const year = 365 * 24 * time.Hour
	for _, shift := range []time.Duration{year, -year} {
		l.say("the clock jumps to %v", shift)
		c.clock.set(shift)
		_ = testrelay.Wait(ctx, clockWrongFor)
		status, text, _ := health(ctx, c.life.Admin, "/readyz")
		lines = append(lines, note(fmt.Sprintf("/readyz after a jump to %+d days", shift/(24*time.Hour)), "%d %s", status, lineOf(text, "certificate")))
	}
	stayed := endsAfter(stays, time.Now(), time.Second)
	lines = append(lines, promise("a connected member stays", stayed >= time.Second, "%s", keptOr(stayed >= time.Second, "gone")))
	c.source.answer(0, http.StatusServiceUnavailable)
	return c.afterSet(ctx, l, lines)
}

// afterSet sets the clock, and appends what must be as before.
func (c clockSubject) afterSet(ctx context.Context, l *lab, lines []measured) ([]measured, error) {
	l.say("the clock is set")
	c.clock.set(0)
	begun := time.Now()
	readyErr := c.life.until(ctx, "ready", func(status int, _ string) bool { return status == http.StatusOK })
	took := time.Since(begun)
	now, err := c.life.shown(ctx)
	if err != nil {
		return nil, err
	}
	c.source.answer(0, 0)
	known := errors.Join(c.life.admitsSoon(ctx, c.member, knownWithin), c.remembers(ctx, c.member.Public()))
	return append(lines,
		l.timely(promise("ready after the clock was set, within "+setWithin.String(), readyErr == nil && took < setWithin, "%s", timeOr(took, readyErr))),
		promise("the same node key, and a certificate that is valid", now.key == c.before.key && time.Now().After(now.leaf.NotBefore) && time.Now().Before(now.leaf.NotAfter),
			"%s", keptOr(now.leaf.Equal(c.before.leaf), "a new certificate")),
		promise("the member is admitted and remembered once the URL answers again", known == nil, "%s", timeOr(0, known)),
		promise(fmt.Sprintf("at most %d orders in all", clockOrders), c.orders() <= clockOrders, "%d", c.orders())), nil
}

// lineOf returns the line of /readyz about a check.
func lineOf(text, check string) string {
	for line := range strings.Lines(text) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[1] == check+":" {
			return firstLine(line)
		}
	}
	return "nothing"
}
