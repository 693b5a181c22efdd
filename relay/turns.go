package relay

import (
	"container/list"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxWaiting is the number of handshakes that may wait, of members and of others
	// each. A core takes about a third of a second for so many.
	maxWaiting = 512

	// turnTimeout limits the wait for a turn.
	turnTimeout = 5 * time.Second
)

var (
	errCrowd = errors.New("too many TLS handshakes at the same time")
	errGone  = errors.New("the client has closed the connection before its TLS handshake had its turn")
)

// turns lets few TLS handshakes compute at the same time, so that packets and the
// self-check find a free processor. A handshake has a turn from its ClientHello to the
// moment when it waits for the client. It has no turn while it waits for the client.
type turns struct {
	atOnce int
	member func(netip.Addr) bool // whether an admitted node was lately at an address
	own    func(netip.AddrPort) bool

	mu      sync.Mutex
	running int          // turns in use; guarded by mu
	waiting [2]list.List // of *turn, members first; empty unless all turns are in use; guarded by mu
	refused uint64       // handshakes beyond maxWaiting or turnTimeout; guarded by mu
	last    time.Time    // of the last refusal; guarded by mu
}

// handshakesAtOnce leaves half of the processors to packets.
func handshakesAtOnce() int { return max(1, runtime.GOMAXPROCS(0)/2) }

func newTurns(member func(netip.Addr) bool, own func(netip.AddrPort) bool) *turns {
	return &turns{atOnce: handshakesAtOnce(), member: member, own: own}
}

// turn is that of one handshake. It ends once, whoever ends it.
type turn struct {
	all   *turns        // nil: over
	ready chan struct{} // closed at the end of the wait; nil without a wait

	running bool          // guarded by all.mu
	over    bool          // guarded by all.mu
	queue   *list.List    // where the turn waits; guarded by all.mu
	place   *list.Element // in queue, nil unless the turn waits; guarded by all.mu
}

// take waits for a turn of the handshake on a connection. The relay's own connections
// need none. An error ends the handshake.
func (t *turns) take(conn net.Conn) error {
	c := socketOf(conn)
	if c == nil || c.turn.Load() != nil || t.own(addrPort(c.RemoteAddr())) {
		return nil
	}
	mine := &turn{all: t}
	if !c.turn.CompareAndSwap(nil, mine) {
		return net.ErrClosed
	}
	if err := t.enter(mine, conn); err != nil || mine.ready == nil {
		return err
	}
	timeout := time.NewTimer(turnTimeout)
	defer timeout.Stop()
	select {
	case <-mine.ready:
	case <-timeout.C:
		if mine.end() {
			t.mu.Lock()
			defer t.mu.Unlock()
			return t.refuse()
		}
	}
	if c.isGone() {
		mine.end()
		return errGone
	}
	return nil
}

// enter gives a free turn, or else a place in the queue.
func (t *turns) enter(mine *turn, conn net.Conn) error {
	queue := &t.waiting[1]
	if t.busy() && t.member(addrPort(conn.RemoteAddr()).Addr()) {
		queue = &t.waiting[0]
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if mine.over {
		return net.ErrClosed
	}
	if t.running < t.atOnce {
		t.run(mine)
		return nil
	}
	if queue.Len() >= maxWaiting {
		mine.over = true
		return t.refuse()
	}
	mine.ready = make(chan struct{})
	mine.queue, mine.place = queue, queue.PushBack(mine)
	return nil
}

// busy reports whether all turns are in use.
func (t *turns) busy() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.running >= t.atOnce
}

// run starts a turn. It holds t.mu.
func (t *turns) run(m *turn) {
	m.running = true
	t.running++
}

// refuse counts a handshake that gets no turn. It holds t.mu.
func (t *turns) refuse() error {
	t.refused++
	t.last = time.Now()
	return errCrowd
}

// end gives the turn back, or ends the wait for it. It reports whether the turn was not
// over before.
func (m *turn) end() bool {
	t := m.all
	if t == nil {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if m.over {
		return false
	}
	m.over = true
	if m.place != nil {
		m.leave()
	}
	if m.running {
		t.running--
		t.next()
	}
	return true
}

// leave ends the wait. It holds all.mu.
func (m *turn) leave() {
	m.queue.Remove(m.place)
	m.place = nil
	close(m.ready)
}

// next starts the turns that wait, as far as turns are free. It holds t.mu.
func (t *turns) next() {
	for i := range t.waiting {
		for t.running < t.atOnce && t.waiting[i].Len() > 0 {
			m := t.waiting[i].Front().Value.(*turn)
			m.leave()
			t.run(m)
		}
	}
}

// closedTurn is the turn of a closed connection.
var closedTurn turn

// connTurn is the turn of the handshake on a connection, or nil.
type connTurn struct{ atomic.Pointer[turn] }

// giveBack ends the turn, if there is one. Another turn may follow.
func (c *connTurn) giveBack() {
	if m := c.Load(); m != nil && m.end() {
		c.CompareAndSwap(m, nil)
	}
}

// close ends the turn, if there is one. None follows.
func (c *connTurn) close() {
	if m := c.Swap(&closedTurn); m != nil {
		m.end()
	}
}

// Handshakes are numbers of TLS handshakes on the public listener.
type Handshakes struct {
	Waiting     int       // for their turn
	Refused     uint64    // since the start, because too many waited or one waited too long
	LastRefused time.Time // zero if none was
}

// Handshakes returns the present numbers.
func (r *Relay) Handshakes() Handshakes {
	t := r.turns
	t.mu.Lock()
	defer t.mu.Unlock()
	return Handshakes{Waiting: t.waiting[0].Len() + t.waiting[1].Len(), Refused: t.refused, LastRefused: t.last}
}
