package relay

import (
	"context"
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
	r := newRelay(t, Config{Log: zerolog.Nop(), GetCertificate: getCertificate})
	r.server.SetTCPWriteTimeout(2 * time.Second) // in place of writeTimeout
	serve(t, r, ln)
	return r
}

// fill makes the socket of a client full, with bytes that are no frames.
func fill(t *testing.T, r *Relay, node key.NodePublic) (s *session) {
	t.Helper()
	r.sessions.mu.Lock()
	s = r.sessions.nodes[node].sessions[0]
	r.sessions.mu.Unlock()
	zeros := make([]byte, 64<<10)
	for passes := 0; passes < 20; passes++ { // in which the client's kernel takes nothing
		<-time.After(10 * time.Millisecond)
		if err := socketOf(s.below).raw.Control(func(fd uintptr) {
			for {
				if _, errno := rawWrite(fd, zeros); errno != 0 {
					return
				}
				passes = 0
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	if s.hasRoom() {
		t.Fatal("the socket is not full")
	}
	return s
}

// A client whose socket is full delays neither the texts to others nor the end of the
// relay, while derpserver writes nothing to it. The text of the client waits.
func TestFullSocketDelaysNobody(t *testing.T) {
	cert, getCertificate := certificate(t)
	ln := listen(t)
	r := start(t, Config{Log: zerolog.Nop(), GetCertificate: getCertificate, TellClients: true}, ln)
	var full []*session
	for range 3 {
		full = append(full, fill(t, r, connect(t, ln, cert, key.NewNode()).SelfPublicKey()))
	}
	reads := connect(t, ln, cert, key.NewNode())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	told := make(chan struct{})
	go func() {
		defer close(told)
		r.Tell(ctx, "stopping", "this relay is stopping")
	}()
	for {
		message, err := reads.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if message == (derp.HealthMessage{Problem: "this relay is stopping"}) {
			break
		}
	}
	cancel()
	<-told
	for _, s := range full {
		if _, end := s.state(); end != nil || s.told != "" || s.writeErr != nil {
			t.Errorf("a client whose socket is full has the text %q, write error %v, end %v", s.told, s.writeErr, end)
		}
	}
	// TLS waits for five seconds with its closing message, one client after another.
	begun := time.Now()
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(begun); took > 10*time.Second {
		t.Errorf("the relay is closed after %v", took)
	}
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
