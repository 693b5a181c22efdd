package relay

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/pires/go-proxyproto"
	"github.com/rs/zerolog"
)

// proxyHeaderTimeout limits the wait for the first byte and the whole PROXY
// header. The wait blocks only the goroutine of that connection.
const proxyHeaderTimeout = 5 * time.Second

// proxyListener removes the PROXY header (HAProxy's PROXY protocol, version 1 or
// 2) from connections. The header of a trusted proxy sets the addresses of the
// connection. Trusted proxies may omit the header, as their health checks do. Any
// other connection with a header is closed. A malformed header closes the
// connection too.
type proxyListener struct {
	net.Listener
	trusted []netip.Prefix
	first   firstFunc // called with the bytes after the header
	places  *places
	log     zerolog.Logger
}

// Accept implements [net.Listener]. It does not wait for the header.
func (l *proxyListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	policy := proxyproto.REJECT
	if peer, err := netip.ParseAddrPort(conn.RemoteAddr().String()); err == nil && contains(l.trusted, peer.Addr()) {
		policy = proxyproto.USE
	}
	return &proxiedConn{
		Conn:   proxyproto.NewConn(conn, proxyproto.WithPolicy(policy), proxyproto.SetReadHeaderTimeout(proxyHeaderTimeout)),
		first:  l.first,
		places: l.places,
		log:    l.log,
	}, nil
}

// proxiedConn is a connection that may begin with a PROXY header. The first
// method that depends on the header reads it.
type proxiedConn struct {
	*proxyproto.Conn
	first  firstFunc // nil after the first Read; owned by the reader
	places *places
	log    zerolog.Logger
	once   sync.Once
}

// readHeader reads the header and nothing else. After an error, and for a client that
// gets no place, every Read fails. readHeader logs the error, because the HTTP server
// closes the connection without a log line.
func (c *proxiedConn) readHeader() {
	c.once.Do(func() {
		if _, err := c.Conn.Read(nil); err != nil {
			c.log.Debug().Err(err).Stringer("peer", c.NetConn().RemoteAddr()).Msg("connection closed for its PROXY header")
			return
		}
		client, ok := c.Conn.RemoteAddr().(*net.TCPAddr)
		if ok && !c.places.identify(c, addrPort(client).Addr()) {
			_ = c.Close()
		}
	})
}

// Read implements [net.Conn].
func (c *proxiedConn) Read(b []byte) (int, error) {
	c.readHeader()
	n, err := c.Conn.Read(b)
	if first := c.first; first != nil && n > 0 {
		c.first = nil
		first(b[:n], c.NetConn().RemoteAddr())
	}
	return n, err
}

// RemoteAddr returns the client's address in the header, or else the peer's.
func (c *proxiedConn) RemoteAddr() net.Addr {
	c.readHeader()
	// The header of a client on a unix socket has no IP address.
	if client, ok := c.Conn.RemoteAddr().(*net.TCPAddr); ok {
		return client
	}
	return c.NetConn().RemoteAddr()
}

// LocalAddr returns the dialed address in the header, or else the address that
// the peer dialed. A client without a server name gets the certificate of this
// address.
func (c *proxiedConn) LocalAddr() net.Addr {
	c.readHeader()
	if dialed, ok := c.Conn.LocalAddr().(*net.TCPAddr); ok {
		return dialed
	}
	return c.NetConn().LocalAddr()
}

// NetConn returns the connection of the peer, for derpserver's TCP statistics.
func (c *proxiedConn) NetConn() net.Conn { return c.Raw() }

// CloseWrite ends the writing side; see [socketConn.CloseWrite].
func (c *proxiedConn) CloseWrite() error { return closeWrite(c.NetConn()) }

// contains reports whether one of the networks contains addr.
func contains(networks []netip.Prefix, addr netip.Addr) bool {
	addr = addr.Unmap().WithZone("")
	return slices.ContainsFunc(networks, func(network netip.Prefix) bool { return network.Contains(addr) })
}
