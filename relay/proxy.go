package relay

import (
	"bufio"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
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

// forwarded gives requests of trusted proxies the address of the client that
// X-Forwarded-For tells, also as the address of a connection that is taken over.
func forwarded(trusted []netip.Prefix, next http.Handler) http.Handler {
	if len(trusted) == 0 {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		peer, err := netip.ParseAddrPort(r.RemoteAddr)
		if err != nil {
			next.ServeHTTP(w, r)
			return
		}
		client := forwardedFor(trusted, peer, r.Header.Values("X-Forwarded-For"))
		if client != peer {
			r = r.WithContext(r.Context()) // a copy
			r.RemoteAddr = client.String()
			w = forwardedWriter{w, net.TCPAddrFromAddrPort(client)}
		}
		next.ServeHTTP(w, r)
	})
}

// forwardedFor is the client behind a peer. Each proxy appends whom it got the
// request from, so the list is read from its end: up to the first address that
// is no trusted proxy's, since what stands before that is the client's own
// invention. So it ends too at what is no address.
func forwardedFor(trusted []netip.Prefix, peer netip.AddrPort, lines []string) netip.AddrPort {
	list := strings.Split(strings.Join(lines, ","), ",")
	for _, entry := range slices.Backward(list) {
		if !contains(trusted, peer.Addr()) {
			break
		}
		previous, ok := parseForwarded(strings.Trim(entry, " \t"))
		if !ok {
			break
		}
		peer = previous
	}
	return peer
}

// parseForwarded reads an address, with or without a port; without, it is 0.
// Some proxies put IPv6 addresses into brackets.
func parseForwarded(entry string) (netip.AddrPort, bool) {
	client, err := netip.ParseAddrPort(entry)
	if err != nil {
		if bare, ok := strings.CutPrefix(entry, "["); ok {
			entry, ok = strings.CutSuffix(bare, "]")
			if !ok {
				return netip.AddrPort{}, false
			}
		}
		addr, err := netip.ParseAddr(entry)
		if err != nil {
			return netip.AddrPort{}, false
		}
		client = netip.AddrPortFrom(addr, 0)
	}
	if client.Addr().Zone() != "" || client.Addr().IsUnspecified() || client.Addr().IsMulticast() {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(client.Addr().Unmap(), client.Port()), true
}

// forwardedWriter is an [http.ResponseWriter] whose connection is a
// forwardedConn.
type forwardedWriter struct {
	http.ResponseWriter
	client net.Addr
}

// Hijack implements [http.Hijacker].
func (w forwardedWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, brw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	return forwardedConn{conn, w.client}, brw, nil
}

// forwardedConn is a connection with the address of the client behind it.
type forwardedConn struct {
	net.Conn
	client net.Addr
}

// RemoteAddr implements [net.Conn].
func (c forwardedConn) RemoteAddr() net.Addr { return c.client }

// NetConn is the connection of the proxy.
func (c forwardedConn) NetConn() net.Conn { return c.Conn }

// contains reports whether one of the networks has addr.
func contains(networks []netip.Prefix, addr netip.Addr) bool {
	addr = addr.Unmap().WithZone("")
	return slices.ContainsFunc(networks, func(network netip.Prefix) bool { return network.Contains(addr) })
}
