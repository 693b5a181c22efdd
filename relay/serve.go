package relay

import (
	"crypto/tls"
	"errors"
	"net"
	"net/http"
)

// Serve accepts the connections of clients until [Relay.Close], and then
// returns nil. It closes ln. Each connection passes these layers:
//
//	places.go     whether there is a place for the connection (connlimits.go)
//	socket.go     the TCP connection, read ahead
//	arrival.go    the first bytes, to see what cannot work
//	proxy.go      the PROXY header, with Config.ProxyProtocol
//	turns.go      the turn of a TLS handshake
//	tls.go        TLS, with Config.GetCertificate
//	forwarded.go  X-Forwarded-For, on each HTTP request
//	routes.go     the path of the request
//	hijack.go     the upgrade from HTTP to DERP
//	session.go    the connection that derpserver reads and writes
//	incoming.go   the frames of the client: the first one, and large packets
//	backlog.go    the large packets that wait for a slow client
//	pace.go       the rate of the client's node (nodelimits.go)
//
// The connections of the relay's own self-check (own.go) pass without a place or a turn.
func (r *Relay) Serve(ln net.Listener) error {
	if r.tls == nil {
		return r.serve(r.public, r.accepted(ln, relayPort))
	}
	return r.serve(r.public, tls.NewListener(r.accepted(ln, tlsPort), r.tls))
}

// ServePlain accepts the connections of plain HTTP, normally of port 80, until
// [Relay.Close], and then returns nil. It closes ln. ServePlain may be called
// once.
func (r *Relay) ServePlain(ln net.Listener, handler http.Handler) error {
	r.plain.Handler = r.withoutDERP(handler)
	return r.serve(r.plain, r.accepted(ln, plainPort))
}

// accepted returns ln with the layers that both listeners share.
func (r *Relay) accepted(ln net.Listener, at port) net.Listener {
	ln = socketListener{ln, func(first []byte, peer net.Addr) { r.arrived(at, first, peer) }, r.places}
	if r.config.ProxyProtocol {
		first := func(first []byte, peer net.Addr) { r.arrivedWith(at, first, peer) }
		ln = &proxyListener{ln, r.config.TrustedProxies, first, r.places, r.config.Log}
	}
	return ln
}

// serve returns nil once Close has begun. The caller may close ln before Close
// reaches the server.
func (r *Relay) serve(server *http.Server, ln net.Listener) error {
	err := server.Serve(ln)
	if errors.Is(err, http.ErrServerClosed) || r.closing.Load() {
		return nil
	}
	return err
}

// Close stops both servers, closes every client's connection, and waits until
// derpserver has removed the clients.
func (r *Relay) Close() error {
	r.closing.Store(true)
	err := errors.Join(r.public.Close(), r.plain.Close())
	r.sessions.refuse()
	r.sessions.teller.close()
	err = errors.Join(err, r.server.Close())
	// derpserver has closed its connections. A connection that was just hijacked
	// may not have reached derpserver.
	r.sessions.closeAll()
	r.sessions.teller.wait()
	return err
}
