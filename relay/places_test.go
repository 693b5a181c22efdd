package relay

import (
	"container/heap"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"tailscale.com/types/key"
)

// peerConn is a connection from an address. It carries nothing.
type peerConn struct {
	net.Conn
	peer   netip.AddrPort
	closed bool
}

func (c *peerConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.peer) }

func (c *peerConn) Close() error {
	c.closed = true
	return nil
}

// arrival returns a new connection from an address, without a place.
func (p *places) arrival(addr string) *socketConn {
	return &socketConn{Conn: &peerConn{peer: netip.AddrPortFrom(netip.MustParseAddr(addr), 4000)}, places: p}
}

// come returns a new connection from an address, and whether it got a place.
func (p *places) come(addr string) (*socketConn, bool) {
	c := p.arrival(addr)
	return c, p.take(c)
}

// mustCome is come for connections that must get a place.
func (p *places) mustCome(t *testing.T, addr string) *socketConn {
	t.Helper()
	c, ok := p.come(addr)
	if !ok {
		t.Fatalf("a connection from %s got no place", addr)
	}
	return c
}

// mustNotCome fails if a connection gets a place.
func (p *places) mustNotCome(t *testing.T, addr string, limit Limit) {
	t.Helper()
	before := p.count(limit)
	if _, ok := p.come(addr); ok {
		t.Errorf("a connection from %s got a place", addr)
	}
	if got := p.count(limit); got != before+1 {
		t.Errorf("the limit %q counts %d, want %d", limit, got, before+1)
	}
}

func (p *places) count(limit Limit) uint64 {
	for _, l := range p.state().Limited {
		if l.Limit == limit {
			return l.Count
		}
	}
	return 0
}

func isClosed(c *socketConn) bool { return c.Conn.(*peerConn).closed }

func admitAll(context.Context, key.NodePublic, netip.Addr) error { return nil }

// closed returns the places of a relay with admission, and opened those of one without.
func closed(l Limits) *places { return newPlaces(Config{Limits: l, Admit: admitAll}) }
func opened(l Limits) *places { return newPlaces(Config{Limits: l}) }

// A crowd of strangers loses its oldest connections to a new client: those of the
// address that has the most.
func TestCrowdMakesRoom(t *testing.T) {
	p := closed(Limits{Strangers: 6})
	var crowd, few []*socketConn
	for range 4 {
		crowd = append(crowd, p.mustCome(t, "192.0.2.1"))
	}
	for range 2 {
		few = append(few, p.mustCome(t, "192.0.2.2"))
	}
	p.mustNotCome(t, "192.0.2.1", LimitStrangers) // the crowd itself, at once
	p.touch(crowd[0])
	p.mustCome(t, "192.0.2.3")
	if isClosed(crowd[0]) || !isClosed(crowd[1]) || isClosed(crowd[2]) {
		t.Error("want the connection closed whose last step is the oldest")
	}
	p.mustCome(t, "192.0.2.3")
	if !isClosed(crowd[2]) || isClosed(crowd[3]) || isClosed(few[0]) || isClosed(few[1]) {
		t.Error("want the crowd to lose connections")
	}
	// Every address has two now.
	p.mustNotCome(t, "192.0.2.2", LimitStrangers)
	p.mustCome(t, "192.0.2.4")
	if s := p.state(); s.Open != 6 || s.Waiting != 6 {
		t.Errorf("state %+v, want 6 open", s)
	}
}

// Between addresses with as many connections, the oldest one gives its place up
// after the tenure, and not before.
func TestTenure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := closed(Limits{Strangers: 3, PerAddress: 2})
		a := p.mustCome(t, "192.0.2.1")
		<-time.After(time.Millisecond)
		b := p.mustCome(t, "192.0.2.2")
		c := p.mustCome(t, "192.0.2.2")
		<-time.After(tenure - 2*time.Millisecond)
		p.touch(b)
		p.mustNotCome(t, "192.0.2.2", LimitPerAddress)
		<-time.After(time.Millisecond)
		p.mustNotCome(t, "192.0.2.2", LimitPerAddress)
		<-time.After(time.Millisecond)
		d := p.mustCome(t, "192.0.2.2")
		if !isClosed(c) || isClosed(a) || isClosed(b) {
			t.Error("at the limit of an address, want its own oldest connection closed")
		}
		p.mustCome(t, "192.0.2.3")
		if !isClosed(b) || isClosed(a) {
			t.Error("want the oldest connection of the larger crowd closed at once")
		}
		p.mustCome(t, "192.0.2.4")
		if !isClosed(d) || isClosed(a) {
			t.Error("want the connection closed whose address has tried most")
		}
		p.mustCome(t, "192.0.2.5") // a is as old as the tenure
		if !isClosed(a) {
			t.Error("want the oldest connection closed")
		}
		p.mustNotCome(t, "192.0.2.6", LimitStrangers)
	})
}

// Addresses that an admitted node came from have places that strangers cannot take.
func TestKnownAddresses(t *testing.T) {
	p := closed(Limits{Connections: 16, Strangers: 8, PerAddress: 6})
	member := p.mustCome(t, "192.0.2.1")
	if p.member(netip.MustParseAddr("192.0.2.1")) {
		t.Error("an address is known before its node was admitted")
	}
	waiting := p.mustCome(t, "192.0.2.1")
	p.admitted(member)
	if !p.member(netip.MustParseAddr("::ffff:192.0.2.1")) || p.member(netip.MustParseAddr("192.0.2.2")) {
		t.Error("want the address of the admitted node known, and no other")
	}
	for i := range 8 {
		p.mustCome(t, fmt.Sprint("198.51.100.", i))
	}
	p.mustNotCome(t, "192.0.2.9", LimitStrangers)
	if isClosed(waiting) {
		t.Error("strangers closed a waiting connection of a known address")
	}
	for range 5 {
		p.mustCome(t, "192.0.2.1") // beside the strangers
	}
	p.mustNotCome(t, "192.0.2.1", LimitPerAddress)
	if s := p.state(); s.Open != 15 || s.Waiting != 14 {
		t.Errorf("state %+v, want 15 open and 14 waiting", s)
	}

	// A member that returns later is known.
	_ = member.Close()
	for _, a := range p.addresses {
		for _, c := range slices.Clone(a.waiting) {
			_ = c.Close()
		}
	}
	if s := p.state(); s.Open != 0 || s.Waiting != 0 || p.strangers != 0 || len(p.addresses) != 0 || len(p.crowds) != 0 {
		t.Errorf("state %+v, %d addresses; want nothing left", s, len(p.addresses))
	}
	if !p.member(netip.MustParseAddr("192.0.2.1")) {
		t.Error("the address of a member is forgotten")
	}
	for i := range 8 {
		p.mustCome(t, fmt.Sprint("198.51.100.", i))
	}
	p.mustNotCome(t, "192.0.2.9", LimitStrangers)
	p.mustCome(t, "192.0.2.1")
}

// Two connections that come at the same time take the places of two others: the first of
// these is not closed yet when the second comes.
func TestEachTakesOnePlace(t *testing.T) {
	p := closed(Limits{Strangers: 4})
	for range 4 {
		p.mustCome(t, "192.0.2.1")
	}
	first, ok := p.sit(p.arrival("192.0.2.2"), netip.MustParseAddr("192.0.2.2"))
	second, alsoOK := p.sit(p.arrival("192.0.2.3"), netip.MustParseAddr("192.0.2.3"))
	if first == nil || second == nil || first == second || !ok || !alsoOK || p.total != 4 {
		t.Errorf("%p %t and %p %t make room, and %d connections have a place, want 4", first, ok, second, alsoOK, p.total)
	}
}

// The last eighth of all connections is for known addresses. At the limit they take
// the places of waiting strangers.
func TestReserveOfMembers(t *testing.T) {
	p := closed(Limits{Connections: 16})
	member := p.mustCome(t, "192.0.2.1")
	p.admitted(member)
	var strangers []*socketConn
	for i := range 13 {
		strangers = append(strangers, p.mustCome(t, fmt.Sprint("198.51.100.", i)))
	}
	p.mustNotCome(t, "198.51.100.99", LimitConnections)
	p.mustCome(t, "192.0.2.1")
	p.mustCome(t, "192.0.2.1")
	p.mustCome(t, "192.0.2.1")
	if !isClosed(strangers[0]) || isClosed(strangers[1]) {
		t.Error("want the oldest stranger closed for a member")
	}
	for _, c := range strangers[1:] {
		p.admitted(c)
	}
	before := p.state().Open
	for _, c := range slices.Clone(p.addresses[netip.MustParseAddr("192.0.2.1")].waiting) {
		p.admitted(c)
	}
	p.mustNotCome(t, "192.0.2.1", LimitConnections) // nobody waits
	if got := p.state().Open; got != before || got != 16 {
		t.Errorf("%d connections, want %d", got, before)
	}
}

// Members behind one address do not count against the limit of an address, unless
// the relay is open.
func TestManyMembersOfOneAddress(t *testing.T) {
	p := closed(Limits{PerAddress: 2})
	for range 50 {
		p.admitted(p.mustCome(t, "192.0.2.1"))
	}
	p = opened(Limits{PerAddress: 2, Connections: 8})
	p.admitted(p.mustCome(t, "192.0.2.1"))
	second := p.mustCome(t, "192.0.2.1")
	p.admitted(second)
	p.mustNotCome(t, "192.0.2.1", LimitPerAddress)
	_ = second.Close()
	p.mustCome(t, "192.0.2.1")
	if !p.member(netip.MustParseAddr("192.0.2.1")) || p.addresses[netip.MustParseAddr("192.0.2.1")].known {
		t.Error("a client of an open relay has places of its own, or is not known to the handshakes")
	}
	// Nothing is reserved on an open relay.
	for i := range 6 {
		p.mustCome(t, fmt.Sprint("198.51.100.", i))
	}
	p.mustCome(t, "198.51.100.99") // 192.0.2.1 has tried more often
	p.mustNotCome(t, "198.51.100.98", LimitConnections)
}

// An IPv6 network of 64 bits is one address.
func TestNetworks(t *testing.T) {
	p := closed(Limits{PerAddress: 1})
	p.mustCome(t, "2001:db8:0:1::1")
	p.mustNotCome(t, "2001:db8:0:1:ffff::2", LimitPerAddress)
	p.mustCome(t, "2001:db8:0:2::1")
	p.mustCome(t, "192.0.2.1")
	p.mustNotCome(t, "::ffff:192.0.2.1", LimitPerAddress)
	p.mustCome(t, "192.0.2.2")
}

// The rate of an address begins with a burst. Other addresses have a rate of their own.
func TestAcceptRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := closed(Limits{AcceptRate: 2, AcceptBurst: 3, Shared: []netip.Prefix{netip.MustParsePrefix("172.17.0.1/32")}})
		for range 3 {
			_ = p.mustCome(t, "192.0.2.1").Close()
		}
		p.mustNotCome(t, "192.0.2.1", LimitAcceptRate)
		p.mustCome(t, "192.0.2.2")
		<-time.After(500 * time.Millisecond)
		p.mustCome(t, "192.0.2.1")
		p.mustNotCome(t, "192.0.2.1", LimitAcceptRate)
		for range 100 {
			p.mustCome(t, "172.17.0.1") // a gateway
		}
	})
}

// The connection of a proxy counts for its client once the client is known.
func TestIdentify(t *testing.T) {
	proxy, client := "10.0.0.5", netip.MustParseAddr("192.0.2.1")
	p := newPlaces(Config{
		Limits:         Limits{PerAddress: 1, AcceptRate: 1, AcceptBurst: 2},
		TrustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Admit: admitAll,
	})
	var list []*socketConn
	for range 3 {
		list = append(list, p.mustCome(t, proxy))
	}
	for range 2 { // the second time changes nothing
		if !p.identify(list[0], client) {
			t.Error("the first connection of a client is refused")
		}
	}
	if p.identify(list[1], client) || p.count(LimitPerAddress) != 1 || p.state().Open != 2 {
		t.Errorf("%+v; want the second connection of a client refused", p.state())
	}
	_ = list[1].Close()
	_ = list[0].Close()
	if p.identify(list[2], client) || p.count(LimitAcceptRate) != 1 {
		t.Errorf("%+v; want the third connection refused for its rate", p.state())
	}
	if s := p.state(); s.Open != 0 || len(p.addresses) != 0 {
		t.Errorf("state %+v, want nothing left", s)
	}
	// A connection that was closed meanwhile takes no place.
	if !p.identify(list[0], netip.MustParseAddr("192.0.2.3")) || p.state().Open != 0 {
		t.Errorf("state %+v, want nothing left", p.state())
	}
}

// The relay's own connections take no place.
func TestOwnConnections(t *testing.T) {
	p := closed(Limits{Connections: 1, PerAddress: 1, AcceptRate: 1, AcceptBurst: 1})
	p.own = func(peer netip.AddrPort) bool { return peer.String() == "127.0.0.1:4000" }
	for range 3 {
		c := p.mustCome(t, "127.0.0.1")
		p.touch(c)
		p.admitted(c)
		defer func() { _ = c.Close() }()
	}
	p.mustCome(t, "127.0.0.2")
	p.mustNotCome(t, "127.0.0.3", LimitConnections)
	if s := p.state(); s.Open != 1 {
		t.Errorf("state %+v, want one connection", s)
	}
}

// The table of known addresses keeps those in use, and is bounded.
func TestKnownAddressesAreBounded(t *testing.T) {
	p := newPlaces(Config{})
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}) }
	for i := range 2 * maxKnown {
		p.remember(addr(i))
		if !p.member(addr(0)) || !p.member(addr(i)) {
			t.Fatalf("an address in use, or the latest one, is lost after %d others", i)
		}
	}
	if p.known.Len() != maxKnown || p.member(addr(1)) {
		t.Errorf("%d known addresses, want the latest %d", p.known.Len(), maxKnown)
	}
}

// FuzzPlaces compares the counters with the connections that are open, after every
// step of a history.
func FuzzPlaces(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7})
	f.Add([]byte{0, 0, 0, 0, 0, 8, 16, 3, 1, 0, 0, 2, 9, 9, 0, 0, 5, 40, 0, 0, 6, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, history []byte) {
		open := false
		p := newPlaces(Config{
			Limits:         Limits{Connections: 16, Strangers: 6, PerAddress: 3},
			TrustedProxies: []netip.Prefix{netip.MustParsePrefix("192.0.2.7/32")},
			Open:           func() bool { return open },
		})
		var all []*socketConn
		pick := func(b byte) *socketConn {
			if len(all) == 0 {
				return p.arrival("192.0.2.1")
			}
			return all[int(b/8)%len(all)]
		}
		for _, b := range history {
			addr := netip.AddrFrom4([4]byte{192, 0, 2, b / 8 % 8})
			switch b % 8 {
			case 0, 1, 2:
				if c, ok := p.come(addr.String()); ok {
					all = append(all, c)
				}
			case 3:
				p.admitted(pick(b))
			case 4:
				p.touch(pick(b))
			case 5:
				_ = pick(b).Close()
			case 6:
				if c := pick(b); !p.identify(c, addr) {
					_ = c.Close()
				}
			case 7:
				open = b > 128
				p.begin = p.begin.Add(-tenure / 2)
			}
			all = slices.DeleteFunc(all, isClosed)
			checkPlaces(t, p, all)
		}
		for _, c := range all {
			_ = c.Close()
			_ = c.Close()
		}
		checkPlaces(t, p, nil)
	})
}

// checkPlaces compares the counters with the open connections.
func checkPlaces(t *testing.T, p *places, all []*socketConn) {
	t.Helper()
	waiting, strangers, crowds := 0, 0, 0
	admitted := make(map[*address]int)
	for _, c := range all {
		a := c.place.at
		switch {
		case a == nil || p.addresses[a.addr] != a:
			t.Fatalf("an open connection has the place %+v", c.place)
		case c.place.admitted():
			admitted[a]++
		case !slices.Contains(a.waiting, c):
			t.Fatal("a connection waits, and its address does not have it")
		default:
			waiting++
			if !a.known {
				strangers++
			}
		}
	}
	for _, a := range p.addresses {
		if a.admitted != admitted[a] || a.admitted == 0 && len(a.waiting) == 0 {
			t.Fatalf("%v has %d admitted connections, want %d, and %d wait", a.addr, a.admitted, admitted[a], len(a.waiting))
		}
		if !slices.IsSortedFunc(a.waiting, func(a, b *socketConn) int { return int(a.place.since - b.place.since) }) {
			t.Fatalf("%v: the oldest connection is not the first", a.addr)
		}
		if inHeap := a.index >= 0; inHeap != (!a.known && len(a.waiting) > 0) || inHeap && p.crowds[a.index] != a {
			t.Fatalf("%v is at %d of the heap", a.addr, a.index)
		} else if inHeap {
			crowds++
		}
		waiting -= len(a.waiting)
	}
	for i := range p.crowds {
		if i > 0 && p.crowds.Less(i, 0) {
			t.Fatal("the first address of the heap is not the largest crowd")
		}
	}
	if p.total != len(all) || waiting != 0 || p.strangers != strangers || len(p.crowds) != crowds {
		t.Fatalf("total %d, strangers %d, heap %d; want %d, %d, %d", p.total, p.strangers, len(p.crowds), len(all), strangers, crowds)
	}
	if p.total > p.limits.Connections {
		t.Fatalf("%d connections, the limit is %d", p.total, p.limits.Connections)
	}
	var _ heap.Interface = &p.crowds
}
