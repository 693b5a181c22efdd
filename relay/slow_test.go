package relay

import (
	"crypto/tls"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// A client that takes no packets, or ten bytes a second, is disconnected when a write
// takes longer than the write timeout.
func TestSlowClientIsDisconnected(t *testing.T) {
	cert, getCertificate := certificate(t)
	for name, secure := range map[string]bool{"plain": false, "TLS": true, "WebSocket": false} {
		for _, trickles := range []bool{false, true} {
			t.Run(name+map[bool]string{false: ", reads nothing", true: ", trickles"}[trickles], func(t *testing.T) {
				t.Parallel()
				ln := listen(t)
				r := newSlowRelay(t, ln, secure, getCertificate)
				private := key.NewNode()
				slow := private.Public()
				info := private.SealTo(r.PublicKey(), []byte(`{"version":2}`))
				first := slices.Concat([]byte{byte(derp.FrameClientInfo), 0, 0, 0, byte(derp.KeyLen + len(info))}, slow.AppendTo(nil), info)

				var below, conn net.Conn
				switch name {
				case "WebSocket":
					below = upgradeToWebSocket(t, ln.Addr().String())
					conn, first = below, append(messageHeader(binaryMessage, len(first)), first...)
				default:
					below = scan(t, ln.Addr().String())
					conn, first = below, append([]byte(fastStart), first...)
				}
				senderCert := cert
				if secure {
					config := testkit.Trust(testkit.Pool(cert))
					config.ServerName = "127.0.0.1"
					conn = tls.Client(below, config)
				} else {
					senderCert = nil
				}
				if _, err := conn.Write(first); err != nil {
					t.Fatal(err)
				}
				testkit.Until(t, "the client is admitted", func() bool { return r.sessions.backlogOf(slow) == 0 })
				sender := connect(t, ln, senderCert, key.NewNode())
				if trickles {
					stop := make(chan struct{})
					defer close(stop)
					go trickle(below, stop)
				}
				testkit.Until(t, "the slow client is disconnected", func() bool {
					send(t, sender, slow, 100, 1280)
					return r.sessions.backlogOf(slow) < 0
				})
			})
		}
	}
}

// newSlowRelay serves with TLS or without.
func newSlowRelay(t *testing.T, ln net.Listener, secure bool, getCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *Relay {
	t.Helper()
	if !secure {
		getCertificate = nil
	}
	return start(t, Config{Log: zerolog.Nop(), GetCertificate: getCertificate}, ln)
}

// trickle reads ten bytes a second.
func trickle(conn net.Conn, stop <-chan struct{}) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for b := make([]byte, 1); ; {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		if _, err := conn.Read(b); err != nil {
			return
		}
	}
}
