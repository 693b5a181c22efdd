package relay

import (
	"math"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"tailscale.com/util/lru"
)

// tenure is the time for which a waiting connection keeps its place although another
// one of its address, or of an address with as many connections, wants it. A client needs
// about three round trips before its node is admitted, and each step begins the time again.
const tenure = 300 * time.Millisecond

// Tables of addresses keep the latest known addresses, and the latest visitors. The
// memory of both is below one megabyte each.
const maxKnown, maxVisitors = 4096, 2048

// attemptsHalved is the time in which an attempt to connect loses half of its weight.
const attemptsHalved = 5 * time.Second

// visitor is an address that has tried to connect.
type visitor struct {
	limiter  *rate.Limiter // nil without a rate
	attempts float64       // an attempt at the time last counts one
	last     time.Duration // of the last attempt, on the clock of the places
}

// places counts the connections of both listeners, and decides which are accepted. A
// place is taken by accept, and given back by [socketConn.Close]. A nil *places accepts
// every connection.
type places struct {
	limits Limits
	exempt []netip.Prefix            // addresses that stand for many clients
	open   func() bool               // whether anybody may use the relay
	own    func(netip.AddrPort) bool // whether the peer is this relay itself; may be nil
	begin  time.Time

	mu        sync.Mutex
	total     int                             // guarded by mu
	strangers int                             // waiting connections of unknown addresses; guarded by mu
	waiting   int                             // waiting connections; guarded by mu
	addresses map[netip.Addr]*address         // those with a place; guarded by mu
	crowds    crowds                          // unknown addresses with a waiting connection; guarded by mu
	known     lru.Cache[netip.Addr, struct{}] // addresses without a place that had an admitted node; guarded by mu
	visitors  lru.Cache[netip.Addr, *visitor] // guarded by mu
	limited   map[Limit]*LimitCount           // of [AllLimits] alone; guarded by mu
}

func newPlaces(c Config) *places {
	p := &places{
		limits: c.Limits, exempt: slices.Concat(c.TrustedProxies, c.Limits.Shared), open: c.Open, begin: time.Now(),
		addresses: make(map[netip.Addr]*address),
		known:     lru.Cache[netip.Addr, struct{}]{MaxEntries: maxKnown},
		visitors:  lru.Cache[netip.Addr, *visitor]{MaxEntries: maxVisitors},
		limited:   make(map[Limit]*LimitCount),
	}
	if p.open == nil {
		p.open = func() bool { return c.Admit == nil }
	}
	for _, l := range AllLimits() {
		p.limited[l] = &LimitCount{Limit: l}
	}
	return p
}

// take gives a new connection a place. It may close an older connection for that. Without
// a place the connection must be closed.
func (p *places) take(c *socketConn) bool {
	if p == nil {
		return true
	}
	peer := addrPort(c.RemoteAddr())
	if p.own != nil && p.own(peer) {
		return true
	}
	return p.enter(c, p.addressOf(peer.Addr()), false)
}

// identify moves a connection of a proxy to the address of its client. Without a place
// for that address, the connection must be closed.
func (p *places) identify(conn net.Conn, client netip.Addr) bool {
	c := socketOf(conn)
	if p == nil || c == nil {
		return true
	}
	return p.enter(c, p.addressOf(client), true)
}

// enter takes a place at an address. A connection that moves gives back its place first.
func (p *places) enter(c *socketConn, addr netip.Addr, moves bool) bool {
	p.mu.Lock()
	if moves {
		if c.place.at == nil || c.place.admitted() || c.place.at.addr == addr {
			p.mu.Unlock()
			return true
		}
		p.leave(c)
	}
	older, ok := p.sit(c, addr)
	p.mu.Unlock()
	if older != nil {
		older.abort()
	}
	return ok
}

// sit takes a place, or reports that a limit is reached. It returns an older connection
// that has lost its place and must be closed.
func (p *places) sit(c *socketConn, addr netip.Addr) (older *socketConn, ok bool) {
	attempts, ok := p.mayCome(addr)
	if !ok {
		p.note(LimitAcceptRate)
		return nil, false
	}
	a := p.addresses[addr]
	if a == nil {
		_, client := p.known.GetOk(addr)
		a = &address{addr: addr, client: client, known: client && !p.open(), index: -1}
	}
	a.attempts = attempts
	p.crowds.update(a)
	if limit := p.reached(a); limit != "" {
		p.note(limit)
		if older = p.crowded(a, limit); older == nil {
			return nil, false
		}
		p.leave(older)
	}
	p.addresses[addr] = a // leave may have removed it
	p.total++
	p.wait(c, a)
	return older, true
}

// mayCome reports whether the rate of an address allows one more connection. It returns
// half of the earlier attempts, so that a client may try again.
func (p *places) mayCome(addr netip.Addr) (attempts int, ok bool) {
	if !addr.IsValid() {
		return 0, true
	}
	v, ok := p.visitors.GetOk(addr)
	if !ok {
		v = new(visitor)
		if p.limits.AcceptRate > 0 {
			v.limiter = rate.NewLimiter(rate.Limit(p.limits.AcceptRate), p.limits.AcceptBurst)
		}
		p.visitors.Set(addr, v)
	}
	now := p.now()
	v.attempts *= math.Exp2(-(now - v.last).Seconds() / attemptsHalved.Seconds())
	attempts = int(v.attempts / 2)
	v.attempts++
	v.last = now
	return attempts, v.limiter == nil || v.limiter.Allow()
}

// reached returns the limit that one more connection of an address exceeds, or "".
func (p *places) reached(a *address) Limit {
	open := p.open()
	ofAddress := len(a.waiting)
	if open {
		ofAddress += a.admitted
	}
	connections := p.limits.Connections
	if !a.known && a.addr.IsValid() && !open {
		connections -= connections / 8
	}
	switch {
	case a.addr.IsValid() && exceeds(ofAddress, p.limits.PerAddress):
		return LimitPerAddress
	case !a.known && exceeds(p.strangers, p.limits.Strangers):
		return LimitStrangers
	case exceeds(p.total, connections):
		return LimitConnections
	}
	return ""
}

func exceeds(count, limit int) bool { return limit > 0 && count >= limit }

// crowded returns the connection that gives its place to a new one of address a, or nil.
// It is the oldest waiting connection of the address with the largest weight, if that
// weight exceeds a's by two. A crowd from some addresses thus never keeps an address out
// that tries less often. Otherwise the connection must be older than tenure. At the limit
// of an address, it is a connection of the same address.
func (p *places) crowded(a *address, limit Limit) *socketConn {
	most := a
	if limit != LimitPerAddress {
		if len(p.crowds) == 0 {
			return nil
		}
		most = p.crowds[0]
	}
	if len(most.waiting) == 0 {
		return nil
	}
	oldest := most.waiting[0]
	if a.known && most != a || most.weight() > a.weight()+1 || p.now()-oldest.place.since >= tenure {
		return oldest
	}
	return nil
}

// touch notes that a client has made a step towards its admission.
func (p *places) touch(conn net.Conn) {
	c := socketOf(conn)
	if p == nil || c == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if a := c.place.at; a != nil && !c.place.admitted() {
		p.stopWaiting(c)
		p.wait(c, a)
	}
}

// admitted notes that derpserver has admitted the node of a connection. It does not wait.
func (p *places) admitted(conn net.Conn) {
	c := socketOf(conn)
	if p == nil || c == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	a := c.place.at
	if a == nil || c.place.admitted() {
		return
	}
	p.stopWaiting(c)
	c.place.since = sinceAdmitted
	a.admitted++
	a.client = true
	if !a.known && a.addr.IsValid() && !p.open() {
		a.known = true
		p.strangers -= len(a.waiting)
		p.crowds.update(a)
	}
}

// remember adds the address of another node of the mesh to the known ones.
func (p *places) remember(addr netip.Addr) {
	if addr = p.addressOf(addr); !addr.IsValid() {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.known.Set(addr, struct{}{})
}

// Member reports whether an admitted node came lately from an address.
func (r *Relay) Member(addr netip.Addr) bool { return r.places.member(addr) }

// member is [Relay.Member].
func (p *places) member(addr netip.Addr) bool {
	if addr = p.addressOf(addr); !addr.IsValid() {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if a := p.addresses[addr]; a != nil {
		return a.client
	}
	_, known := p.known.GetOk(addr)
	return known
}

// give gives back the place of a connection. A second call has no effect.
func (p *places) give(c *socketConn) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.place.at != nil {
		p.leave(c)
	}
}

// leave gives back a place.
func (p *places) leave(c *socketConn) {
	a := c.place.at
	if c.place.admitted() {
		a.admitted--
	} else {
		p.stopWaiting(c)
	}
	c.place = place{}
	p.total--
	if a.admitted == 0 && len(a.waiting) == 0 {
		delete(p.addresses, a.addr)
		if a.client && a.addr.IsValid() {
			p.known.Set(a.addr, struct{}{})
		}
	}
}

// wait adds a connection to the waiting ones of an address, as the latest.
func (p *places) wait(c *socketConn, a *address) {
	c.place = place{at: a, since: p.now()}
	a.waiting = append(a.waiting, c)
	p.waiting++
	if !a.known {
		p.strangers++
	}
	p.crowds.update(a)
}

// stopWaiting removes a connection from the waiting ones of its address.
func (p *places) stopWaiting(c *socketConn) {
	a := c.place.at
	i := slices.Index(a.waiting, c)
	a.waiting = slices.Delete(a.waiting, i, i+1)
	p.waiting--
	if !a.known {
		p.strangers--
	}
	p.crowds.update(a)
}

// note counts a connection that a limit closes.
func (p *places) note(limit Limit) {
	l := p.limited[limit]
	l.Count++
	l.Last = time.Now()
}

func (p *places) now() time.Duration { return time.Since(p.begin) }

// addressOf returns the address that addr counts for: addr itself, or its network of 64
// bits. It is the zero address for an address that stands for many clients.
func (p *places) addressOf(addr netip.Addr) netip.Addr {
	addr = addr.Unmap().WithZone("")
	switch {
	case p != nil && contains(p.exempt, addr):
		return netip.Addr{}
	case addr.Is6():
		return netip.PrefixFrom(addr, 64).Masked().Addr()
	}
	return addr
}

// state returns the state of the connections.
func (p *places) state() Places {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := Places{Open: p.total, Waiting: p.waiting}
	for _, l := range AllLimits() {
		s.Limited = append(s.Limited, *p.limited[l])
	}
	return s
}

// Places returns the state of the connections of both listeners.
func (r *Relay) Places() Places { return r.places.state() }
