package relay_test

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/net/stun"

	"derpd/relay"
)

// serveSTUN runs an open STUN server until the test has ended, and then calls
// ended.
func serveSTUN(t *testing.T, listen string, c relay.STUNConfig, ended ...func(*relay.STUN)) (*relay.STUN, *net.UDPAddr) {
	t.Helper()
	s, addr := listenSTUN(t, listen, c)
	runSTUN(t, s, ended...)
	return s, addr
}

// listenSTUN makes an open server that does not run yet.
func listenSTUN(t *testing.T, listen string, c relay.STUNConfig) (*relay.STUN, *net.UDPAddr) {
	t.Helper()
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(listen)))
	if err != nil {
		t.Fatal(err)
	}
	c.Conn = conn
	s, err := relay.NewSTUN(c)
	if err != nil {
		t.Fatal(err)
	}
	s.SetOpen(true)
	return s, conn.LocalAddr().(*net.UDPAddr)
}

// runSTUN runs a server until the test has ended.
func runSTUN(t *testing.T, s *relay.STUN, ended ...func(*relay.STUN)) {
	t.Helper()
	end := beginSTUN(t, s)
	t.Cleanup(func() {
		end()
		for _, f := range ended {
			f(s)
		}
	})
}

// beginSTUN runs a server until end, which fails the test if that takes long.
func beginSTUN(t *testing.T, s *relay.STUN) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return func() {
		t.Helper()
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Fatal("the server does not end")
		}
	}
}

// STUN is closed until it is opened, and again when it is closed.
func TestSTUNGate(t *testing.T) {
	s, addr := serveSTUN(t, "127.0.0.1:0", relay.STUNConfig{Log: zerolog.Nop()})
	s.SetOpen(false)
	client := dialSTUN(t, "127.0.0.1:0", addr)
	buf := make([]byte, 1500)
	send := func() stun.TxID {
		tx := stun.NewTxID()
		if _, err := client.Write(stun.Request(tx)); err != nil {
			t.Fatal(err)
		}
		return tx
	}
	for round := range 3 {
		send()
		// A closed server leaves no trace: only silence for a while tells.
		if err := client.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if n, err := client.Read(buf); err == nil {
			t.Fatalf("round %d: a closed server answered %x", round, buf[:n])
		}
		s.SetOpen(true)
		want := send()
		if err := client.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		n, err := client.Read(buf)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		got, addr, err := stun.ParseResponse(buf[:n])
		if err != nil || got != want || addr != client.LocalAddr().(*net.UDPAddr).AddrPort() {
			t.Fatalf("round %d: got %v for %s, %v", round, got, addr, err)
		}
		s.SetOpen(false)
	}
}

// Strangers send anything; the next real request is answered all the same.
func TestSTUNIgnoresNonsense(t *testing.T) {
	_, addr := serveSTUN(t, "127.0.0.1:0", relay.STUNConfig{Log: zerolog.Nop()})
	client := dialSTUN(t, "127.0.0.1:0", addr)
	request := stun.Request(stun.NewTxID())
	flipped := append([]byte(nil), request...)
	flipped[len(flipped)-1] ^= 1 // the fingerprint
	for _, packet := range [][]byte{{}, {0}, request[:19], flipped, make([]byte, 4000)} {
		if _, err := client.Write(packet); err != nil {
			t.Fatal(err)
		}
	}
	askSTUN(t, client) // the first answer is for this one
}

// The log tells of a gateway once, however many requests there are.
func TestSTUNTellsOfTheGatewayOnce(t *testing.T) {
	var log bytes.Buffer
	_, addr := serveSTUN(t, "127.0.0.1:0", relay.STUNConfig{
		Gateways: []netip.Addr{netip.MustParseAddr("127.0.0.2")},
		Log:      zerolog.New(&log),
	}, func(s *relay.STUN) {
		if count, last := s.Refused(); count != 3 || time.Since(last) > patience {
			t.Errorf("%d refused, the last at %s; want 3", count, last)
		}
		if n := strings.Count(log.String(), `"level":"warn"`); n != 1 || !strings.Contains(log.String(), `"gateway":"127.0.0.2"`) {
			t.Errorf("%d warnings, want 1 that names the gateway:\n%s", n, log.String())
		}
	})
	gateway := dialSTUN(t, "127.0.0.2:0", addr)
	for range 3 {
		if _, err := gateway.Write(stun.Request(stun.NewTxID())); err != nil {
			t.Fatal(err)
		}
	}
	askSTUN(t, dialSTUN(t, "127.0.0.3:0", addr))
	if err := gateway.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := gateway.Read(make([]byte, 1500)); err == nil {
		t.Errorf("the gateway has an answer of %d bytes", n)
	}
}

func dialSTUN(t *testing.T, from string, server *net.UDPAddr) *net.UDPConn {
	t.Helper()
	conn, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(from)), server)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// askSTUN fails the test unless the server names the socket's own address.
func askSTUN(t *testing.T, client *net.UDPConn) {
	t.Helper()
	want := stun.NewTxID()
	if _, err := client.Write(stun.Request(want)); err != nil {
		t.Fatal(err)
	}
	if err := client.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1500)
	n, err := client.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	got, seen, err := stun.ParseResponse(buf[:n])
	if err != nil || got != want || seen != client.LocalAddr().(*net.UDPAddr).AddrPort() {
		t.Errorf("asked from %s: the answer is %s for %v, want %v, %v", client.LocalAddr(), seen, got, want, err)
	}
}

// On one socket for both families, each reply leaves from the address that was
// asked: a connected client takes it from nowhere else.
func TestSTUNRepliesFromTheAddressAsked(t *testing.T) {
	_, addr := serveSTUN(t, "[::]:0", relay.STUNConfig{Log: zerolog.Nop()})
	for _, asked := range []string{"127.0.0.1", "127.0.0.2", "::1"} {
		from := "127.0.0.1:0"
		if asked == "::1" {
			from = "[::1]:0"
		}
		askSTUN(t, dialSTUN(t, from, &net.UDPAddr{IP: net.ParseIP(asked), Port: addr.Port}))
	}
	_, v4 := serveSTUN(t, "0.0.0.0:0", relay.STUNConfig{Log: zerolog.Nop()})
	askSTUN(t, dialSTUN(t, "127.0.0.1:0", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2), Port: v4.Port}))
}

// Many requests at once, from clients of which some are gone by the time of the
// answer: the refusals of those do not end the server, nor lose the others'.
func TestSTUNBurst(t *testing.T) {
	_, addr := serveSTUN(t, "[::]:0", relay.STUNConfig{Log: zerolog.Nop()})
	server := &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: addr.Port}
	client := dialSTUN(t, "127.0.0.1:0", server)
	const requests = 100
	for range 5 {
		want := make(map[stun.TxID]bool)
		for range requests {
			gone := dialSTUN(t, "127.0.0.1:0", server)
			if _, err := gone.Write(stun.Request(stun.NewTxID())); err != nil {
				t.Fatal(err)
			}
			_ = gone.Close()
			tx := stun.NewTxID()
			want[tx] = true
			if _, err := client.Write(stun.Request(tx)); err != nil {
				t.Fatal(err)
			}
		}
		if err := client.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 1500)
		for len(want) > 0 {
			n, err := client.Read(buf)
			if err != nil {
				t.Fatalf("%d of %d answers are missing: %v", len(want), requests, err)
			}
			tx, _, err := stun.ParseResponse(buf[:n])
			if err != nil || !want[tx] {
				t.Fatalf("an answer for %v, %v", tx, err)
			}
			delete(want, tx)
		}
	}
}

// What waits at the start is answered at once, much of it by one message for
// many: each client gets every answer as a packet of its own, from the address
// that it asked.
func TestSTUNAnswersTogether(t *testing.T) {
	for _, listen := range []string{"[::]:0", "0.0.0.0:0"} {
		s, addr := listenSTUN(t, listen, relay.STUNConfig{Log: zerolog.Nop()})
		asked := []string{"127.0.0.1", "127.0.0.2"}
		if listen == "[::]:0" {
			asked = append(asked, "::1")
		}
		const requests = 40
		clients, want := make([]*net.UDPConn, len(asked)), make([][]stun.TxID, len(asked))
		for i, ip := range asked {
			from := "127.0.0.1:0"
			if ip == "::1" {
				from = "[::1]:0"
			}
			clients[i] = dialSTUN(t, from, &net.UDPAddr{IP: net.ParseIP(ip), Port: addr.Port})
			for range requests {
				tx := stun.NewTxID()
				want[i] = append(want[i], tx)
				if _, err := clients[i].Write(stun.Request(tx)); err != nil {
					t.Fatal(err)
				}
			}
		}
		runSTUN(t, s)
		for i, client := range clients {
			if err := client.SetReadDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 1500)
			for k, tx := range want[i] {
				n, err := client.Read(buf)
				if err != nil {
					t.Fatalf("%s, %s: answer %d: %v", listen, asked[i], k, err)
				}
				got, seen, err := stun.ParseResponse(buf[:n])
				if err != nil || got != tx || seen != client.LocalAddr().(*net.UDPAddr).AddrPort() {
					t.Fatalf("%s, %s: answer %d is for %v, %s, %v", listen, asked[i], k, got, seen, err)
				}
			}
		}
	}
}

// The end comes at once, also while no request does.
func TestSTUNEnds(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", "[::1]:0", "[::]:0", "0.0.0.0:0"} {
		s, addr := listenSTUN(t, listen, relay.STUNConfig{Log: zerolog.Nop()})
		end := beginSTUN(t, s)
		client, err := net.DialUDP("udp", nil, addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = client.Close() })
		askSTUN(t, client)
		t.Log(listen)
		end()
		// The port is free again.
		again, err := net.ListenUDP("udp", addr)
		if err != nil {
			t.Errorf("%s: %v", listen, err)
			continue
		}
		_ = again.Close()
	}
}

// Nor does it wait for a pause between the requests.
func TestSTUNEndsUnderFlood(t *testing.T) {
	s, addr := listenSTUN(t, "127.0.0.1:0", relay.STUNConfig{Log: zerolog.Nop()})
	end := beginSTUN(t, s)
	var senders sync.WaitGroup
	defer senders.Wait()
	ended, flowing := make(chan struct{}), make(chan struct{})
	defer close(ended)
	const clients = 3
	for range clients {
		client := dialSTUN(t, "127.0.0.1:0", addr)
		senders.Go(func() {
			request := stun.Request(stun.NewTxID())
			for i := range 1_000_000 { // far more than are needed
				if i == 1000 {
					flowing <- struct{}{}
				}
				select {
				case <-ended:
					return
				default:
					_, _ = client.Write(request) // refused after the end
				}
			}
		})
	}
	for range clients {
		<-flowing
	}
	end()
}
