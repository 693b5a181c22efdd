package relay

import (
	"bufio"
	"net"
	"net/http"
	"net/netip"
)

// hijacker is an [http.ResponseWriter]. Its Hijack returns a session.
type hijacker struct {
	http.ResponseWriter
	request  *http.Request
	sessions *sessions
}

// Hijack implements [http.Hijacker].
func (h hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	s := newSession(h.sessions, conn, buffered.Reader, remoteAddr(h.request, conn))
	h.sessions.add(s)
	// The session returns what the HTTP server has buffered, so these buffers
	// are empty. derpserver replaces them: the smallest size is enough.
	const smallest = 16
	return s, bufio.NewReadWriter(bufio.NewReaderSize(s, smallest), bufio.NewWriterSize(s, smallest)), nil
}

// remoteAddr returns the address of the client: from the PROXY header or
// X-Forwarded-For if there is one, and otherwise the peer's.
func remoteAddr(r *http.Request, conn net.Conn) net.Addr {
	client, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return conn.RemoteAddr()
	}
	return net.TCPAddrFromAddrPort(client)
}
