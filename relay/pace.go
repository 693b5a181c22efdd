package relay

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

const (
	// stepsPerSecond divides a wait into steps. A read of 64 KiB waits for each step
	// in turn, so other connections of the node come in between.
	stepsPerSecond = 20

	// leastStep is the shortest step in bytes: more than a packet.
	leastStep = 2 << 10

	// lookEvery is the interval at which a waiting connection is checked for its end.
	lookEvery = 250 * time.Millisecond
)

// pace is the rate of one node. All connections of the node share it.
//
// The reader of a connection waits after each read, without a lock. TCP then stops
// the client once the buffers of the socket are full.
type pace struct {
	rate     int64 // bytes per second
	limiter  *rate.Limiter
	step     int           // bytes of one wait, at most the burst
	replaced chan struct{} // closed when another limit applies to the node

	waited atomic.Int64 // nanoseconds that readers have waited since the last look
	slowed atomic.Bool  // whether the node has been slowed down for slowedAfter

	busy, quiet int // looks at a slowed node, and at one that is not; owned by [Relay.RunNodeLimits]
}

// newPace returns a pace. Before is the pace that it replaces, or nil: the tokens are
// taken over, so that a change gives no second burst.
func newPace(limit NodeLimit, before *pace) *pace {
	p := &pace{
		rate:     limit.Rate,
		limiter:  rate.NewLimiter(rate.Limit(limit.Rate), limit.Burst),
		step:     min(max(int(min(limit.Rate/stepsPerSecond, 1<<20)), leastStep), limit.Burst),
		replaced: make(chan struct{}),
	}
	if before != nil {
		now := time.Now()
		spent := limit.Burst - max(int(before.limiter.TokensAt(now)), 0)
		p.limiter.AllowN(now, max(spent, 0))
	}
	return p
}

// is reports whether p is the pace of a limit.
func (p *pace) is(limit NodeLimit) bool {
	return p != nil && p.rate == limit.Rate && p.limiter.Burst() == limit.Burst
}

// isFull reports whether the node has not sent lately.
func (p *pace) isFull() bool { return p.limiter.Tokens() >= float64(p.limiter.Burst()) }

// text is the health problem of a node that is slowed down.
func (p *pace) text() string {
	return "this node may send at most " + FormatRate(p.rate) + " through this relay; the owner of the relay can raise the limit"
}

// FormatRate returns a rate in bytes per second as text, in bits: 20 Mbit/s.
func FormatRate(bytes int64) string {
	bits := float64(bytes) * 8
	for _, unit := range []struct {
		size float64
		name string
	}{{1e9, "Gbit/s"}, {1e6, "Mbit/s"}, {1e3, "kbit/s"}} {
		if bits >= unit.size {
			return strconv.FormatFloat(bits/unit.size, 'f', -1, 64) + " " + unit.name
		}
	}
	return fmt.Sprintf("%.0f bit/s", bits)
}

// paced is the pace of one session.
type paced struct {
	*pace
	ended  chan struct{} // closed when the session ends
	socket *socketConn   // nil if there is none
	looked time.Time     // last check of socket; owned by the reader
}

// errReplaced means that another limit applies now.
var errReplaced = errors.New("another limit applies")

// pause waits until the node may have sent n more bytes. It returns an error as soon
// as the session ends, and when the client has closed the connection.
func (s *session) pause(n int) error {
	for n > 0 {
		p := s.paced.Load()
		if p == nil {
			return nil
		}
		step := min(n, p.step)
		waited, err := p.wait(step)
		if waited > 0 {
			p.waited.Add(int64(waited))
			s.all.waits.Add(1)
			s.all.waited.Add(int64(waited))
		}
		switch {
		case err == nil:
			n -= step
		case !errors.Is(err, errReplaced):
			return err
		}
	}
	return nil
}

// wait takes tokens for some bytes, at most p.step, and returns how long it waited.
// An error gives the tokens back.
func (p *paced) wait(bytes int) (waited time.Duration, err error) {
	begun := time.Now()
	tokens := p.limiter.ReserveN(begun, bytes)
	delay := tokens.DelayFrom(begun)
	for waited < delay && err == nil {
		if p.hungUp() {
			err = io.EOF
			break
		}
		timer := time.NewTimer(min(delay-waited, lookEvery))
		select {
		case <-timer.C:
		case <-p.ended:
			err = net.ErrClosed
		case <-p.replaced:
			err = errReplaced
		}
		timer.Stop()
		waited = time.Since(begun)
	}
	if err != nil {
		tokens.Cancel()
	}
	return waited, err
}

// hungUp reports whether the client has closed the connection. A reader that waits does
// not see the end, because bytes that it has not read come before the end.
func (p *paced) hungUp() bool {
	if p.socket == nil || time.Since(p.looked) < lookEvery {
		return false
	}
	p.looked = time.Now()
	return p.socket.isGone()
}

// setPace sets the pace of the connection; nil is none.
func (s *session) setPace(p *pace) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.paced.Load()
	switch {
	case s.end != nil:
	case p == nil:
		s.paced.Store(nil)
	case now == nil || now.pace != p:
		s.paced.Store(&paced{pace: p, ended: make(chan struct{}), socket: socketOf(s.below)})
	}
}
