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
//	socket.go     the TCP connection, read ahead
//	proxy.go      the PROXY header, with Config.ProxyProtocol
//	tls.go        TLS, with Config.GetCertificate
//	forwarded.go  X-Forwarded-For, on each HTTP request
//	routes.go     the path of the request
//	hijack.go     the upgrade from HTTP to DERP
//	session.go    the connection that derpserver reads and writes
func (r *Relay) Serve(ln net.Listener) error {
	ln = r.accepted(ln)
	if r.tls != nil {
		ln = tls.NewListener(ln, r.tls)
	}
	return r.serve(r.public, ln)
}

// ServePlain accepts the connections of plain HTTP, normally of port 80, until
// [Relay.Close], and then returns nil. It closes ln. ServePlain may be called
// once.
func (r *Relay) ServePlain(ln net.Listener, handler http.Handler) error {
	r.plain.Handler = handler
	return r.serve(r.plain, r.accepted(ln))
}

// accepted returns ln with the layers that both listeners share.
func (r *Relay) accepted(ln net.Listener) net.Listener {
	ln = socketListener{ln}
	if r.config.ProxyProtocol {
		ln = &proxyListener{ln, r.config.TrustedProxies, r.config.Log}
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
	err = errors.Join(err, r.server.Close())
	// derpserver has closed its connections. A connection that was just hijacked
	// may not have reached derpserver.
	r.sessions.closeAll()
	return err
}
