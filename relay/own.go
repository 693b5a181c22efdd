package relay

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// ownPeers are the local addresses of the connections that [Relay.DialSelf] has
// opened. To the relay they are the addresses of peers. No other socket of the
// machine has the same address and port while the connection is open.
type ownPeers struct {
	mu   sync.Mutex
	open map[netip.AddrPort]bool // guarded by mu
}

// has reports whether the peer of an accepted connection is this process. peer is the
// address of the socket, and not one that a proxy has sent.
func (o *ownPeers) has(peer netip.AddrPort) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.open) > 0 && o.open[plainAddr(peer)]
}

func (o *ownPeers) add(local netip.AddrPort) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.open == nil {
		o.open = make(map[netip.AddrPort]bool)
	}
	o.open[plainAddr(local)] = true
}

// remove forgets an address. The zero address is in no set.
func (o *ownPeers) remove(local netip.AddrPort) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.open, plainAddr(local))
}

// plainAddr returns one form of an address, in which a listener on all addresses
// has IPv4 peers as IPv6 addresses.
func plainAddr(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}

// Own reports whether the peer of an accepted connection is this process, by
// [Relay.DialSelf].
func (r *Relay) Own(peer net.Addr) bool {
	tcp, ok := peer.(*net.TCPAddr)
	return ok && r.own.has(tcp.AddrPort())
}

// DialSelf connects to one of the relay's listeners, at an address of this machine.
// The relay recognizes the connection when it accepts it: no limit and no turn applies
// to it, so that strangers cannot keep a self-check away.
func (r *Relay) DialSelf(ctx context.Context, listener netip.AddrPort) (net.Conn, error) {
	if listener.Addr().Zone() != "" { // no map has such an address
		return new(net.Dialer).DialContext(ctx, "tcp", listener.String())
	}
	var local netip.AddrPort
	dialer := net.Dialer{ControlContext: func(_ context.Context, _, _ string, c syscall.RawConn) error {
		r.own.remove(local) // of an attempt that package net repeats
		var err error
		if local, err = bind(c, listener.Addr().Unmap()); err == nil {
			r.own.add(local)
		}
		return err
	}}
	conn, err := dialer.DialContext(ctx, "tcp", listener.String())
	if err != nil {
		r.own.remove(local)
		return nil, err
	}
	return &ownConn{Conn: conn, end: sync.OnceFunc(func() { r.own.remove(local) })}, nil
}

// bind gives a socket a free port of addr, and returns both. The kernel gives an
// explicitly bound port to no other socket of this address.
func bind(c syscall.RawConn, addr netip.Addr) (local netip.AddrPort, err error) {
	controlErr := c.Control(func(fd uintptr) {
		var free unix.Sockaddr = &unix.SockaddrInet6{Addr: addr.As16()}
		if addr.Is4() {
			free = &unix.SockaddrInet4{Addr: addr.As4()}
		}
		if err = os.NewSyscallError("bind", unix.Bind(int(fd), free)); err != nil {
			return
		}
		bound, nameErr := unix.Getsockname(int(fd))
		err = os.NewSyscallError("getsockname", nameErr)
		switch bound := bound.(type) {
		case *unix.SockaddrInet4:
			local = netip.AddrPortFrom(addr, uint16(bound.Port))
		case *unix.SockaddrInet6:
			local = netip.AddrPortFrom(addr, uint16(bound.Port))
		}
	})
	return local, errors.Join(controlErr, err)
}

// ownConn is a connection of [Relay.DialSelf].
type ownConn struct {
	net.Conn
	end func() // the relay forgets the address
}

// Close implements [net.Conn]. The relay forgets the address before another socket can
// get it.
func (c *ownConn) Close() error {
	c.end()
	return c.Conn.Close()
}
