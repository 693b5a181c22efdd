//go:build linux

package main

import (
	"context"
	"fmt"
	"time"

	"derpd/internal/testrelay"
)

const (
	// slowerBy is how many times as slow as in quiet the members may become.
	slowerBy = 5
	// unfelt is a delay that nobody feels. Below it, a multiple of a short delay is
	// the noise of the machine.
	unfelt = 10 * time.Millisecond
	// tooBusy is a delay in quiet that other programs on the machine cause. Such a
	// machine cannot show that the attack caused a longer one.
	tooBusy = 20 * time.Millisecond
	// livezWithin is the time in which /livez answers. A container's health check
	// and a monitor give up after some seconds.
	livezWithin = time.Second
)

// siege is what members and monitors saw before and during an attack.
type siege struct {
	quiet, under traffic
	seen         watched // during the attack
	tally        tally   // of the attacker
}

// besiege attacks a server whose members send, and whose health is watched.
func (l *lab) besiege(ctx context.Context, r *relay, m *members, what load) (siege, error) {
	var s siege
	l.say("%d members in quiet", len(m.clients))
	m.begin()
	if err := testrelay.Wait(ctx, pick(l, 10*time.Second, 3*time.Second)); err != nil {
		return s, err
	}
	var err error
	if s.quiet, err = m.end(ctx); err != nil {
		return s, err
	}
	l.say("attack: %s", what.Kind)
	m.begin()
	w, err := l.watch(ctx, r)
	if err != nil {
		return s, err
	}
	a, err := l.attack(ctx, r, what)
	if err != nil {
		return s, err
	}
	select {
	case <-r.Ended:
		return s, r.died()
	case <-a.done:
	}
	if s.tally, err = a.wait(ctx); err != nil {
		return s, err
	}
	l.say("attack ended: %v", s.tally.counts)
	s.seen = w.stop()
	if s.under, err = m.end(ctx); err != nil {
		return s, err
	}
	return s, r.died()
}

// promises returns the lines about the members and the health of a server.
func (s siege) promises(l *lab) []measured {
	lines := []measured{
		l.loseNothing(s.under),
		s.delay(),
	}
	return append(lines, s.seen.promises(l)...)
}

// loseNothing is the line about the members' packets and connections.
func (l *lab) loseNothing(t traffic) measured {
	return l.timely(promise("members lose no packet", t.Lost == 0 && t.Disconnected == 0 && t.Sent > 0, "%s, p99 %s", t.loss(), millis(t.P99)))
}

// delay is the line about the members' p99. The machine is as busy as the attack makes
// it, so the limit is a multiple of the larger of two delays: that of packets in quiet,
// and that of datagrams under the attack that never reach the server.
func (s siege) delay() measured {
	limit := max(unfelt, slowerBy*max(s.quiet.P99, s.under.Noise))
	line := promise(fmt.Sprintf("members' p99 is below %d times the quiet one, or %s", slowerBy, unfelt), s.under.P99 < limit && s.under.Sent > s.under.Lost,
		"%s, quiet %s, machine %s", millis(s.under.P99), millis(s.quiet.P99), millis(s.under.Noise))
	if line.State == broken && s.quiet.P99 > tooBusy && s.under.Sent > s.under.Lost {
		line.State = notReached
	}
	return line
}

// loss prints what did not arrive.
func (t traffic) loss() string {
	text := fmt.Sprintf("%d of %d lost", t.Lost, t.Sent)
	if t.Disconnected > 0 {
		text += fmt.Sprintf(", %d disconnected", t.Disconnected)
	}
	return text
}

// promises returns the lines about a server's health, which only derpd has but for STUN.
func (w watched) promises(l *lab) []measured {
	lines := []measured{
		l.timely(promise("STUN is open", w.NoSTUN == 0 && w.STUN > 0, "%d of %d looks without an answer", w.NoSTUN, w.STUN)),
	}
	if !l.isDerpd() {
		return lines
	}
	ready := promise("ready", w.NotReady == 0 && w.Ready > 0, "%d of %d looks not ready", w.NotReady, w.Ready)
	if w.Cause != "" {
		ready.Value += ": " + firstLine(w.Cause)
	}
	return append(lines, l.timely(ready),
		l.timely(soon("/livez answers within "+livezWithin.String(), livezWithin, w.Livez, w.Machine, "%s at most", millis(w.Livez))))
}

// memory returns the lines about a server's limit of memory, in bytes.
func (r *relay) memory(limit int64) ([]measured, error) {
	kills, err := r.group.kills()
	if err != nil {
		return nil, err
	}
	peak, err := r.group.peak()
	if err != nil {
		return nil, err
	}
	return []measured{promise(fmt.Sprintf("no kill for memory within %d MB", limit>>20), kills == 0, "%d kills, peak %d MB", kills, peak>>20)}, nil
}
