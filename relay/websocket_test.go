package relay

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// A WebSocket is closed at once, also inside a message that the client says is
// endless, and while the client sends as fast as it can.
func TestWebSocketClosesAtOnce(t *testing.T) {
	for name, tt := range map[string]struct {
		first   derp.FrameType
		endless bool
	}{
		"held, messages without end": {derp.FrameClientInfo, false},
		"held, an endless message":   {derp.FrameClientInfo, true},
		"garbage":                    {derp.FramePing, false},
		"garbage, endless":           {derp.FramePing, true},
		"text, endless":              {0, true},
	} {
		t.Run(name, func(t *testing.T) {
			ln := listen(t)
			r := newRelay(t, Config{Log: zerolog.Nop(), TellClients: true, Admit: func(context.Context, key.NodePublic, netip.Addr) error {
				return errors.New("refused")
			}})
			var serving sync.WaitGroup
			serving.Go(func() { _ = r.Serve(ln) })
			conn := upgradeToWebSocket(t, ln.Addr().String())
			private := key.NewNode()
			info := private.SealTo(r.PublicKey(), []byte(`{"Version":2}`))
			first := append([]byte{byte(tt.first), 0, 0, 0, byte(derp.KeyLen + len(info))}, private.Public().AppendTo(nil)...)
			length := 4096
			if tt.endless {
				length = 1 << 62
			}
			kind := binaryMessage
			if tt.first == 0 {
				kind = textMessage
			}
			var sent atomic.Int64
			serving.Go(func() {
				_, err := conn.Write(append(messageHeader(kind, len(first)+len(info)), append(first, info...)...))
				for next := append(messageHeader(kind, length), make([]byte, 4096)...); err == nil; sent.Add(4096) {
					_, err = conn.Write(next)
					if tt.endless {
						next = next[len(next)-4096:]
					}
				}
			})
			if tt.first == derp.FrameClientInfo {
				testkit.Until(t, "the client is refused, and sends more than is read", func() bool {
					return r.Told().Texts["refused"] == 1 && sent.Load() > heldBytes
				})
			}
			begun := time.Now()
			closed := make(chan time.Duration, 1)
			go func() {
				_ = r.Close()
				closed <- time.Since(begun)
			}()
			if took := testkit.Receive(t, "the end of Close", closed); took > 3*time.Second {
				t.Errorf("Close took %s", took)
			}
			serving.Wait()
		})
	}
}

// upgradeToWebSocket returns a connection to the relay after the upgrade.
func upgradeToWebSocket(t *testing.T, addr string) net.Conn {
	t.Helper()
	conn := scan(t, addr)
	if _, err := io.WriteString(conn, "GET /derp HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: derp\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = response.Body.Close()
	if response.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(response.Status)
	}
	return conn
}

// Opcodes of a last or only frame (RFC 6455 §5.2).
const textMessage, binaryMessage byte = 0x81, 0x82

// messageHeader returns the header of a client's message. The mask is zero, so that
// the bytes of the message are sent as they are.
func messageHeader(kind byte, length int) []byte {
	const masked, length64 = 0x80, 127
	header := binary.BigEndian.AppendUint64([]byte{kind, masked | length64}, uint64(length))
	return append(header, 0, 0, 0, 0)
}

// The deadline of a WebSocket ends a read that discards a message of the wrong type.
func TestWebSocketDeadline(t *testing.T) {
	ln := listen(t)
	r := start(t, Config{Log: zerolog.Nop()}, ln)
	conn := upgradeToWebSocket(t, ln.Addr().String())
	if _, err := conn.Write(messageHeader(textMessage, 1<<62)); err != nil {
		t.Fatal(err)
	}
	// A close frame shows that the relay discards the message.
	for b := make([]byte, 1); b[0] != 0x88; {
		if _, err := io.ReadFull(conn, b); err != nil {
			t.Fatal(err)
		}
	}
	r.sessions.mu.Lock()
	for s := range r.sessions.open {
		_ = s.SetDeadline(time.Now())
	}
	r.sessions.mu.Unlock()
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection is open after its deadline")
	}
}
