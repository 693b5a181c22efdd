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

// proxyHeaderTimeout is how long a connection may take to send its PROXY
// header, or anything else. Who waits is the goroutine of that connection.
const proxyHeaderTimeout = 5 * time.Second

// ProxyProtocol takes the PROXY header (HAProxy's PROXY protocol, version 1 or
// 2) off the connections of ln. One of a trusted proxy tells the addresses of
// the connection; proxies may leave it out, as their health checks do. A
// connection from elsewhere that begins with one is closed, as is one whose
// header cannot be read.
func ProxyProtocol(ln net.Listener, trusted []netip.Prefix, log zerolog.Logger) net.Listener {
	return &proxyListener{ln, trusted, log}
}

type proxyListener struct {
	net.Listener
	trusted []netip.Prefix
	log     zerolog.Logger
}

// Accept does not wait for the header.
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
		Conn: proxyproto.NewConn(conn, proxyproto.WithPolicy(policy), proxyproto.SetReadHeaderTimeout(proxyHeaderTimeout)),
		log:  l.log,
	}, nil
}

// proxiedConn is a connection that may begin with a PROXY header. The first
// call that needs to know reads it.
type proxiedConn struct {
	*proxyproto.Conn
	log  zerolog.Logger
	once sync.Once
}

// readHeader reads the header and nothing else. Every Read fails when it cannot
// be read; what failed is told here, since a server closes such a connection
// without a word.
func (c *proxiedConn) readHeader() {
	c.once.Do(func() {
		if _, err := c.Conn.Read(nil); err != nil {
			c.log.Debug().Err(err).Stringer("peer", c.NetConn().RemoteAddr()).Msg("connection closed for its PROXY header")
			_ = c.Close()
		}
	})
}

// Read implements [net.Conn].
func (c *proxiedConn) Read(b []byte) (int, error) {
	c.readHeader()
	return c.Conn.Read(b)
}

// RemoteAddr is the client by the header, or else the peer.
func (c *proxiedConn) RemoteAddr() net.Addr {
	c.readHeader()
	// A proxy that was reached through a unix socket has no address to tell.
	if client, ok := c.Conn.RemoteAddr().(*net.TCPAddr); ok {
		return client
	}
	return c.NetConn().RemoteAddr()
}

// LocalAddr is what the client dialled by the header, or else what the peer
// did. A client that sends no server name gets the certificate of this address.
func (c *proxiedConn) LocalAddr() net.Addr {
	c.readHeader()
	if dialled, ok := c.Conn.LocalAddr().(*net.TCPAddr); ok {
		return dialled
	}
	return c.NetConn().LocalAddr()
}

// NetConn is the connection of the peer, for derpserver's statistics of TCP.
func (c *proxiedConn) NetConn() net.Conn { return c.Raw() }

// contains reports whether one of the networks has addr.
func contains(networks []netip.Prefix, addr netip.Addr) bool {
	addr = addr.Unmap().WithZone("")
	return slices.ContainsFunc(networks, func(network netip.Prefix) bool { return network.Contains(addr) })
}
