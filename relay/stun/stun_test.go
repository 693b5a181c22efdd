package stun

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"
	upstream "tailscale.com/net/stun"

	"derpd/internal/testkit"
)

// silence is the wait for an answer that must not arrive.
const silence = 100 * time.Millisecond

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// onBothPaths runs a test with the system's way to serve, which is batches on
// Linux, and one by one.
func onBothPaths(t *testing.T, test func(t *testing.T, singly bool)) {
	t.Helper()
	t.Run("system's", func(t *testing.T) { test(t, false) })
	t.Run("singly", func(t *testing.T) { test(t, true) })
}

// listen returns an open server that does not run yet.
func listen(t *testing.T, addr string, singly bool, c Config) (*Server, netip.AddrPort) {
	t.Helper()
	var err error
	if c.Conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Conn.Close() })
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if singly {
		s.serve = s.serveSingly
	}
	s.SetOpen(true)
	return s, c.Conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

// start runs a server until stop, or until the test ends.
func start(t *testing.T, s *Server) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run returned %v", err)
			}
		case <-time.After(testkit.Patience):
			t.Error("Run does not end")
		}
	})
	t.Cleanup(stop)
	return stop
}

// serve returns an open server that runs until the test ends.
func serve(t *testing.T, addr string, singly bool, c Config) (*Server, netip.AddrPort) {
	t.Helper()
	s, bound := listen(t, addr, singly, c)
	start(t, s)
	return s, bound
}

// client is a socket that takes packets of one server's address alone.
type client struct {
	*testing.T
	*net.UDPConn
}

// dial returns a client at an address of the loopback interface.
func dial(t *testing.T, from string, server netip.AddrPort) client {
	t.Helper()
	conn, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(from)), net.UDPAddrFromAddrPort(server))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return client{t, conn}
}

func (c client) send(packet []byte) {
	c.Helper()
	if _, err := c.Write(packet); err != nil {
		c.Fatal(err)
	}
}

// request sends a new request.
func (c client) request() upstream.TxID {
	c.Helper()
	tx := upstream.NewTxID()
	c.send(upstream.Request(tx))
	return tx
}

// expect reads the next packet, and fails the test unless it answers the request
// with the client's own address.
func (c client) expect(want upstream.TxID) {
	c.Helper()
	if tx := c.receive(); tx != want {
		c.Fatalf("%s: answer to %x, want one to %x", c.LocalAddr(), tx, want)
	}
}

// receive returns which request the next packet answers.
func (c client) receive() upstream.TxID {
	c.Helper()
	if err := c.SetReadDeadline(time.Now().Add(testkit.Patience)); err != nil {
		c.Fatal(err)
	}
	buf := make([]byte, packetSize)
	n, err := c.Read(buf)
	if err != nil {
		c.Fatalf("%s: no answer: %v", c.LocalAddr(), err)
	}
	tx, seen, err := upstream.ParseResponse(buf[:n])
	if own := c.LocalAddr().(*net.UDPAddr).AddrPort(); err != nil || seen != own {
		c.Fatalf("%s: answer %x for %s, %v", own, buf[:n], seen, err)
	}
	return tx
}

// expectSilence fails the test if a packet arrives.
func (c client) expectSilence() {
	c.Helper()
	if err := c.SetReadDeadline(time.Now().Add(silence)); err != nil {
		c.Fatal(err)
	}
	buf := make([]byte, packetSize)
	if n, err := c.Read(buf); err == nil {
		c.Errorf("%s: answer %x, want none", c.LocalAddr(), buf[:n])
	}
}

func TestAnswersOnlyWhileOpen(t *testing.T) {
	onBothPaths(t, func(t *testing.T, singly bool) {
		s, addr := listen(t, "127.0.0.1:0", singly, Config{})
		if fresh, err := New(Config{Conn: s.conn}); err != nil || fresh.Open() {
			t.Errorf("a new server is open, or failed: %v", err)
		}
		s.SetOpen(false)
		start(t, s)
		c := dial(t, "127.0.0.1:0", addr)
		for range 2 {
			c.request()
			c.expectSilence()
			if s.Open() {
				t.Error("a closed server says that it is open")
			}
			s.SetOpen(true)
			c.expect(c.request())
			if !s.Open() {
				t.Error("an open server says that it is closed")
			}
			s.SetOpen(false)
		}
		c.request()
		c.expectSilence()
		if got, want := values(t, "stun", s.Metrics())[`stun_requests{disposition="success"}`], int64(2); got != want {
			t.Errorf("%d answers counted, want %d", got, want)
		}
	})
}

// notRequests are packets that get no answer.
func notRequests() map[string][]byte {
	request := upstream.Request(upstream.TxID{1, 2, 3})
	edit := func(at int, value byte) []byte {
		b := bytes.Clone(request)
		b[at] = value
		return b
	}
	return map[string][]byte{
		"empty":             {},
		"one byte":          {0},
		"header":            request[:20],
		"cut off":           request[:len(request)-1],
		"longer":            append(bytes.Clone(request), 0),
		"wrong fingerprint": edit(len(request)-1, request[len(request)-1]^1),
		"another client's":  edit(24, 'T'), // SOFTWARE
		"indication":        edit(1, 0x11),
		"no magic cookie":   edit(4, 0),
		"response":          upstream.Response(upstream.TxID{1}, netip.MustParseAddrPort("192.0.2.1:1")),
		"zeroes":            make([]byte, 200),
		"too long":          longRequest(packetSize + 8),
		"as long as buffer": longRequest(packetSize),
	}
}

// longRequest is a request that upstream's parser accepts.
func longRequest(size int) []byte {
	b := upstream.Request(upstream.TxID{9})
	fill := size - len(b)
	padding := append([]byte{0x80, 0xff, byte((fill - 4) >> 8), byte(fill - 4)}, make([]byte, fill-4)...)
	b = slices.Insert(b, 32, padding...)
	b[2], b[3] = byte((size-20)>>8), byte(size-20)
	return fingerprinted(b)
}

// A server ignores what is not a request, and answers the next request.
func TestIgnoresOtherPackets(t *testing.T) {
	onBothPaths(t, func(t *testing.T, singly bool) {
		s, addr := serve(t, "127.0.0.1:0", singly, Config{})
		c := dial(t, "127.0.0.1:0", addr)
		packets := notRequests()
		for name, packet := range packets {
			t.Run(name, func(*testing.T) { c.send(packet) })
			c.expect(c.request())
		}
		if got, want := values(t, "stun", s.Metrics())[`stun_requests{disposition="not_stun"}`], int64(len(packets)); got != want {
			t.Errorf("%d packets counted as no requests, want %d", got, want)
		}
		c.send(longRequest(packetSize - 4))
		c.expect(upstream.TxID{9})
	})
}

// Requests from a gateway get no answer, are counted, and are logged once.
func TestRefusesGateways(t *testing.T) {
	onBothPaths(t, func(t *testing.T, singly bool) {
		for _, addr := range []string{"127.0.0.1:0", "[::]:0"} { // IPv4, and IPv4 on IPv6
			var log bytes.Buffer
			s, bound := listen(t, addr, singly, Config{
				Gateways: []netip.Addr{netip.MustParseAddr("fd00::1"), netip.MustParseAddr("127.0.0.2")}, Log: zerolog.New(&log),
			})
			stop := start(t, s)
			if count, last := s.Refused(); count != 0 || !last.IsZero() {
				t.Errorf("%s: %d refused, the last at %s, before the first request", addr, count, last)
			}
			server := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), bound.Port())
			begin := time.Now()
			gateway, other := dial(t, "127.0.0.2:0", server), dial(t, "127.0.0.3:0", server)
			for range 3 {
				gateway.request()
			}
			other.expect(other.request())
			gateway.expectSilence()
			stop()
			if count, last := s.Refused(); count != 3 || last.Before(begin) || last.After(time.Now()) {
				t.Errorf("%s: %d refused, the last at %s; want 3", addr, count, last)
			}
			if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, `"level":"warn"`) ||
				!strings.Contains(got, `"gateway":"127.0.0.2"`) || !strings.Contains(got, "publish STUN on 0.0.0.0 only") {
				t.Errorf("%s: want one warning that names the gateway and the fix, got:\n%s", addr, got)
			}
			if got := values(t, "stun", s.Metrics()); got[`stun_addrfamily{family="ipv4"}`] != 1 || got[`stun_requests{disposition="success"}`] != 1 {
				t.Errorf("%s: counted a gateway's requests: %v", addr, got)
			}
		}
	})
}

// A gateway with a link-local address has a zone as a sender, and none in the
// configuration.
func TestRefusesLinkLocalGateways(t *testing.T) {
	s := &Server{gateways: []netip.Addr{netip.MustParseAddr("fe80::1")}}
	if !s.refuse(netip.MustParseAddr("fe80::1%eth0")) || s.refuse(netip.MustParseAddr("fe80::2%eth0")) {
		t.Error("want the gateway refused whatever its zone, and no other address")
	}
}

// Each answer comes from the address that the request was sent to. A client takes
// it from no other.
func TestAnswersFromTheAddressAsked(t *testing.T) {
	onBothPaths(t, func(t *testing.T, singly bool) {
		for listen, asked := range map[string][]string{
			"[::]:0":    {"127.0.0.1", "127.0.0.2", "::1"},
			"0.0.0.0:0": {"127.0.0.1", "127.0.0.2"},
		} {
			s, bound := serve(t, listen, singly, Config{})
			for _, ip := range asked {
				addr := netip.MustParseAddr(ip)
				from := "127.0.0.1:0"
				if addr.Is6() {
					from = "[::1]:0"
				}
				c := dial(t, from, netip.AddrPortFrom(addr, bound.Port()))
				c.expect(c.request())
			}
			if got := values(t, "stun", s.Metrics())["stun_no_local_addr"]; got != 0 {
				t.Errorf("%s: the address asked is unknown for %d requests", listen, got)
			}
		}
	})
}

// Requests that wait at the start get their own answers, also if they are more
// than a batch and of several clients and families.
func TestAnswersWhatWaits(t *testing.T) {
	onBothPaths(t, func(t *testing.T, singly bool) {
		s, bound := listen(t, "[::]:0", singly, Config{})
		var clients []client
		for _, ip := range []string{"127.0.0.1", "127.0.0.2", "::1", "127.0.0.1"} {
			addr := netip.MustParseAddr(ip)
			from := "127.0.0.1:0"
			if addr.Is6() {
				from = "[::1]:0"
			}
			clients = append(clients, dial(t, from, netip.AddrPortFrom(addr, bound.Port())))
		}
		const rounds = 50
		want := make([][]upstream.TxID, len(clients))
		for i := range rounds {
			for k, c := range clients {
				want[k] = append(want[k], c.request())
				if i%7 == 0 {
					c.send([]byte("no request"))
				}
			}
		}
		start(t, s)
		for k, c := range clients {
			for _, tx := range want[k] {
				c.expect(tx)
			}
		}
		for _, c := range clients {
			c.expectSilence()
		}
	})
}

// Clients that close before their answer do not affect the others.
func TestAnswersBesideClientsThatAreGone(t *testing.T) {
	onBothPaths(t, func(t *testing.T, singly bool) {
		_, addr := serve(t, "127.0.0.1:0", singly, Config{})
		c := dial(t, "127.0.0.1:0", addr)
		const requests = 100
		want := make(map[upstream.TxID]bool)
		for range requests {
			gone := dial(t, "127.0.0.1:0", addr)
			gone.request()
			_ = gone.Close()
			want[c.request()] = true
		}
		for range requests {
			tx := c.receive()
			if !want[tx] {
				t.Fatalf("answer to %x, which is no request or has an answer already", tx)
			}
			delete(want, tx)
		}
	})
}

// Run ends at once without requests, and the port is free then.
func TestEnds(t *testing.T) {
	onBothPaths(t, func(t *testing.T, singly bool) {
		for _, addr := range []string{"127.0.0.1:0", "[::1]:0", "[::]:0", "0.0.0.0:0"} {
			s, bound := listen(t, addr, singly, Config{})
			stop := start(t, s)
			server := bound
			if bound.Addr().IsUnspecified() {
				server = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), bound.Port())
			}
			from := "127.0.0.1:0"
			if server.Addr().Is6() {
				from = "[::1]:0"
			}
			c := dial(t, from, server)
			c.expect(c.request())
			stop()
			testkit.Until(t, "the port is free", func() bool {
				again, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(bound))
				if err == nil {
					_ = again.Close()
				}
				return err == nil
			})
		}
	})
}

// Run does not wait for a pause between requests.
func TestEndsUnderFlood(t *testing.T) {
	onBothPaths(t, func(t *testing.T, singly bool) {
		s, addr := listen(t, "127.0.0.1:0", singly, Config{})
		stop := start(t, s)
		var senders sync.WaitGroup
		defer senders.Wait()
		ended, flowing := make(chan struct{}), make(chan struct{})
		defer close(ended)
		const clients = 3
		for range clients {
			c := dial(t, "127.0.0.1:0", addr)
			senders.Go(func() {
				request := upstream.Request(upstream.NewTxID())
				for i := range 1_000_000 { // more than the test needs
					if i == 1000 {
						flowing <- struct{}{}
					}
					select {
					case <-ended:
						return
					default:
						_, _ = c.Write(request) // refused after the end
					}
				}
			})
		}
		for range clients {
			<-flowing
		}
		stop()
	})
}

// Nothing is answered after the context has ended, however much waits.
func TestEndsBeforeWhatWaits(t *testing.T) {
	s, addr := listen(t, "127.0.0.1:0", false, Config{})
	c := dial(t, "127.0.0.1:0", addr)
	for range 200 {
		c.request()
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Run(ctx); err != nil {
		t.Fatal(err)
	}
	c.expectSilence()
}

// Run retries failed reads, with pauses, and answers again when a read succeeds.
func TestReadErrors(t *testing.T) {
	onBothPaths(t, func(t *testing.T, singly bool) {
		s, addr := listen(t, "127.0.0.1:0", singly, Config{})
		c := dial(t, "127.0.0.1:0", addr)
		if err := s.conn.SetReadDeadline(time.Now().Add(-time.Second)); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		start(t, s)
		testkit.Until(t, "5 read errors", func() bool { return s.counters.readError.Value() >= 5 })
		if took := time.Since(begin); took < 75*time.Millisecond {
			t.Errorf("5 reads within %s, want pauses of 5, 10, 20 and 40 ms between them", took)
		}
		if err := s.conn.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		c.expect(c.request())
		if got := values(t, "stun", s.Metrics())[`stun_requests{disposition="read_error"}`]; got < 5 {
			t.Errorf("%d read errors counted", got)
		}
	})
}

// A server whose reads fail ends, too.
func TestEndsAmongReadErrors(t *testing.T) {
	s, _ := listen(t, "127.0.0.1:0", false, Config{})
	if err := s.conn.SetReadDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	stop := start(t, s)
	testkit.Until(t, "a read error", func() bool { return s.counters.readError.Value() > 0 })
	stop()
	if err := s.conn.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the socket was not closed: %v", err)
	}
}

// Run returns when other code closes the socket.
func TestEndsWithTheSocket(t *testing.T) {
	onBothPaths(t, func(t *testing.T, singly bool) {
		s, _ := listen(t, "127.0.0.1:0", singly, Config{})
		done := make(chan error, 1)
		go func() { done <- s.Run(context.Background()) }()
		_ = s.conn.Close()
		select {
		case err := <-done:
			if err != nil || s.counters.readError.Value() != 0 {
				t.Errorf("Run returned %v after %d read errors", err, s.counters.readError.Value())
			}
		case <-time.After(testkit.Patience):
			t.Error("Run does not end")
		}
	})
}

func TestNewReportsErrors(t *testing.T) {
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	if s, err := New(Config{Conn: conn}); s != nil || err == nil || !strings.Contains(err.Error(), "enabling pktinfo") {
		t.Errorf("New on a closed socket returned %v, %v", s, err)
	}
}
