package relay

import (
	"bufio"
	"context"
	"expvar"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/coder/websocket"
	"tailscale.com/net/wsconn"
)

// webSocketAccepts is derpserver's counter of WebSockets.
var webSocketAccepts, _ = expvar.Get("derp_websocket_accepts").(*expvar.Int)

// webSockets serves DERP over WebSockets, and passes other requests to next. It
// replaces derpserver.AddWebSocketSupport, whose connections are no sessions.
func (r *Relay) webSockets(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		// Very old clients request a WebSocket and then send DERP. Only real ones
		// name the subprotocol.
		if !strings.EqualFold(req.Header.Get("Upgrade"), "websocket") || !strings.Contains(req.Header.Get("Sec-Websocket-Protocol"), "derp") {
			next.ServeHTTP(w, req)
			return
		}
		below := &hijacked{ResponseWriter: w}
		c, err := websocket.Accept(below, req, &websocket.AcceptOptions{
			Subprotocols:    []string{"derp"},
			OriginPatterns:  []string{"*"},
			CompressionMode: websocket.CompressionDisabled, // packets are encrypted
		})
		if err != nil {
			r.config.Log.Debug().Err(err).Msg("WebSocket not accepted")
			return
		}
		if c.Subprotocol() != "derp" {
			_ = c.Close(websocket.StatusPolicyViolation, "client must speak the derp subprotocol")
			return
		}
		if webSocketAccepts != nil {
			webSocketAccepts.Add(1)
		}
		// The request's context ends with this function, and a held session may not.
		conn := webSocket{wsconn.NetConn(context.Background(), c, websocket.MessageBinary, req.RemoteAddr), below.conn, c}
		s := newSession(r.sessions, conn, nil, remoteAddr(req, conn))
		r.sessions.add(s)
		r.server.Accept(context.Background(), s, bufio.NewReadWriter(bufio.NewReader(s), nil), req.RemoteAddr)
	})
}

// webSocket is a connection over a WebSocket. Deadlines and Close act on the
// connection below. The closing handshake of package websocket reads the rest of the
// client's message, without a limit on length or time.
type webSocket struct {
	net.Conn
	below  net.Conn
	socket *websocket.Conn
}

// Close implements [net.Conn]. It sends no close frame.
func (c webSocket) Close() error {
	err := c.below.Close()
	_ = c.socket.CloseNow()
	return err
}

// SetDeadline implements [net.Conn].
func (c webSocket) SetDeadline(t time.Time) error { return c.below.SetDeadline(t) }

// SetReadDeadline implements [net.Conn].
func (c webSocket) SetReadDeadline(t time.Time) error { return c.below.SetReadDeadline(t) }

// SetWriteDeadline implements [net.Conn].
func (c webSocket) SetWriteDeadline(t time.Time) error { return c.below.SetWriteDeadline(t) }

// hijacked is an [http.ResponseWriter] that keeps its hijacked connection.
type hijacked struct {
	http.ResponseWriter
	conn net.Conn
}

// Hijack implements [http.Hijacker].
func (h *hijacked) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := http.NewResponseController(h.ResponseWriter).Hijack()
	h.conn = conn
	return conn, buffered, err
}
