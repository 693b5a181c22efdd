package relay

import (
	"bufio"
	"context"
	"expvar"
	"net/http"
	"strings"

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
		c, err := websocket.Accept(w, req, &websocket.AcceptOptions{
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
		conn := wsconn.NetConn(context.Background(), c, websocket.MessageBinary, req.RemoteAddr)
		s := newSession(r.sessions, conn, nil, remoteAddr(req, conn))
		r.sessions.add(s)
		r.server.Accept(context.Background(), s, bufio.NewReadWriter(bufio.NewReader(s), nil), req.RemoteAddr)
	})
}
