package relay

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"tailscale.com/derp"
)

// headSize is far above the head of a DERP client's request.
const headSize = 2 << 10

// headBuffers holds *[headSize]byte.
var headBuffers = sync.Pool{New: func() any { return new([headSize]byte) }}

// TLSListener makes a listener for [http.Server.Serve] whose connections are
// TLS. The request of a DERP client goes to handler, the HTTP server's, as soon
// as it has been read, and the HTTP server sees the end of the connection: that
// is cheaper. Every other request is read by the HTTP server, and so is one of
// a DERP client that is in the least unusual.
func TLSListener(l net.Listener, c *tls.Config, handler http.Handler) net.Listener {
	return &tlsListener{Listener: l, config: c, handler: handler}
}

type tlsListener struct {
	net.Listener
	config  *tls.Config
	handler http.Handler
}

// Accept implements [net.Listener].
func (l *tlsListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &tlsConn{conn: tls.Server(conn, l.config), handler: l.handler}, nil
}

// tlsConn is a TLS connection of the HTTP server, which handshakes in a
// goroutine of each connection, under its timeouts: so that is where the first
// request is looked at.
type tlsConn struct {
	conn    *tls.Conn
	handler http.Handler

	// Of the HTTP server's goroutine.
	unread []byte // what was read in search of a DERP client

	mu    sync.Mutex
	taken bool // by handler; guarded by mu
}

// HandshakeContext is what [http.Server] calls, as that of [tls.Conn].
func (c *tlsConn) HandshakeContext(context.Context) error {
	// A context that can end costs a goroutine to watch it, and the HTTP
	// server closes its connections when it ends that one.
	if err := c.conn.HandshakeContext(context.Background()); err != nil {
		return err
	}
	head := headBuffers.Get().(*[headSize]byte)
	defer headBuffers.Put(head)
	// An error comes again with the HTTP server's read.
	n, _ := c.conn.Read(head[:])
	request, length := derpRequest(head[:n])
	if request == nil {
		c.unread = bytes.Clone(head[:n])
		return nil
	}
	c.mu.Lock()
	c.taken = true
	c.mu.Unlock()
	request.RemoteAddr = c.conn.RemoteAddr().String()
	w := &upgradeWriter{conn: c.conn}
	if length < n {
		w.conn = &readFirst{Conn: c.conn, unread: bytes.Clone(head[length:n])}
	}
	c.handler.ServeHTTP(w, request)
	return w.finish(request)
}

// ConnectionState is what [http.Server] calls, as that of [tls.Conn].
func (c *tlsConn) ConnectionState() tls.ConnectionState { return c.conn.ConnectionState() }

// isTaken reports whether the HTTP server has no part in it any more.
func (c *tlsConn) isTaken() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.taken
}

// Read implements [net.Conn].
func (c *tlsConn) Read(p []byte) (int, error) {
	if len(c.unread) > 0 {
		n := copy(p, c.unread)
		c.unread = c.unread[n:]
		return n, nil
	}
	if c.isTaken() {
		return 0, io.EOF
	}
	return c.conn.Read(p)
}

// Write implements [net.Conn].
func (c *tlsConn) Write(p []byte) (int, error) {
	if c.isTaken() {
		return 0, net.ErrClosed
	}
	return c.conn.Write(p)
}

// Close implements [net.Conn].
func (c *tlsConn) Close() error {
	if c.isTaken() {
		return nil
	}
	return c.conn.Close()
}

// CloseWrite ends our half, as that of [tls.Conn] does.
func (c *tlsConn) CloseWrite() error {
	if c.isTaken() {
		return nil
	}
	return c.conn.CloseWrite()
}

// NetConn is the connection below, as that of [tls.Conn] is.
func (c *tlsConn) NetConn() net.Conn { return c.conn.NetConn() }

// LocalAddr implements [net.Conn].
func (c *tlsConn) LocalAddr() net.Addr { return c.conn.LocalAddr() }

// RemoteAddr implements [net.Conn].
func (c *tlsConn) RemoteAddr() net.Addr { return c.conn.RemoteAddr() }

// SetDeadline implements [net.Conn].
func (c *tlsConn) SetDeadline(t time.Time) error { return c.deadline(c.conn.SetDeadline, t) }

// SetReadDeadline implements [net.Conn].
func (c *tlsConn) SetReadDeadline(t time.Time) error { return c.deadline(c.conn.SetReadDeadline, t) }

// SetWriteDeadline implements [net.Conn].
func (c *tlsConn) SetWriteDeadline(t time.Time) error { return c.deadline(c.conn.SetWriteDeadline, t) }

func (c *tlsConn) deadline(set func(time.Time) error, t time.Time) error {
	if c.isTaken() {
		return nil // whoever took it has its own
	}
	return set(t)
}

// derpRequest parses the request of a DERP client, and nothing else: nil if it
// is not all there, or has anything that such a client does not send. length is
// where what follows begins.
func derpRequest(p []byte) (r *http.Request, length int) {
	head, _, ok := bytes.Cut(p, []byte("\r\n\r\n"))
	if !ok {
		return nil, 0
	}
	length = len(head) + len("\r\n\r\n")
	for _, c := range head {
		if c > '~' || c < ' ' && c != '\r' && c != '\n' {
			return nil, 0
		}
	}
	fields, ok := strings.CutPrefix(string(head), "GET /derp HTTP/1.1\r\n")
	if !ok {
		return nil, 0
	}
	r = &http.Request{
		Method: http.MethodGet, URL: &url.URL{Path: "/derp"}, RequestURI: "/derp",
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: make(http.Header, 5), Body: http.NoBody,
	}
	for field := range strings.SplitSeq(fields, "\r\n") {
		name, value, ok := strings.Cut(field, ": ")
		name = knownField(name)
		if !ok || name == "" || value == "" || strings.Trim(value, " ") != value || strings.ContainsAny(value, "\r\n") || r.Header[name] != nil {
			return nil, 0
		}
		r.Header[name] = []string{value}
	}
	if !strings.EqualFold(r.Header.Get("Upgrade"), "derp") || !strings.EqualFold(r.Header.Get("Connection"), "upgrade") {
		return nil, 0
	}
	if r.Host = r.Header.Get("Host"); r.Host == "" {
		return nil, 0
	}
	delete(r.Header, "Host") // as in every request of net/http
	return r, length
}

// knownField is the canonical name of a field that DERP clients send, or empty.
func knownField(name string) string {
	for _, known := range []string{"Host", "User-Agent", "Connection", "Upgrade", derp.FastStartHeader, derp.IdealNodeHeader} {
		if strings.EqualFold(name, known) {
			return http.CanonicalHeaderKey(known)
		}
	}
	return ""
}

// upgradeWriter is the [http.ResponseWriter] of a request that is there to be
// hijacked. Any other answer is the last on its connection.
type upgradeWriter struct {
	conn     net.Conn
	hijacked bool
	header   http.Header
	status   int
	body     bytes.Buffer
}

// Hijack implements [http.Hijacker].
func (w *upgradeWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	if w.hijacked {
		return nil, nil, http.ErrHijacked
	}
	w.hijacked = true
	// Only meshKeyWriter reads from this, and nothing writes to it.
	return w.conn, bufio.NewReadWriter(bufio.NewReaderSize(w.conn, 16), nil), nil
}

// Header implements [http.ResponseWriter].
func (w *upgradeWriter) Header() http.Header {
	if w.header == nil {
		w.header = make(http.Header)
	}
	return w.header
}

// WriteHeader implements [http.ResponseWriter].
func (w *upgradeWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
}

// Write implements [http.ResponseWriter].
func (w *upgradeWriter) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	return w.body.Write(p)
}

// finish sends the answer, if the connection was not hijacked.
func (w *upgradeWriter) finish(r *http.Request) error {
	if w.hijacked {
		return nil
	}
	w.WriteHeader(http.StatusOK)
	answer := http.Response{
		StatusCode: w.status, ProtoMajor: 1, ProtoMinor: 1, Request: r, Close: true,
		Header: w.Header(), Body: io.NopCloser(&w.body), ContentLength: int64(w.body.Len()),
	}
	return errors.Join(answer.Write(w.conn), w.conn.Close())
}

// readFirst is a connection some of whose bytes were read already. Its reader
// is one goroutine.
type readFirst struct {
	*tls.Conn
	unread []byte
}

// Read implements [net.Conn].
func (c *readFirst) Read(p []byte) (int, error) {
	if len(c.unread) == 0 {
		return c.Conn.Read(p)
	}
	n := copy(p, c.unread)
	if c.unread = c.unread[n:]; len(c.unread) == 0 {
		c.unread = nil // a connection lasts
	}
	return n, nil
}
