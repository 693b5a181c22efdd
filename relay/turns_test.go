package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// socketPair returns an accepted connection and the client's end of it.
func socketPair(t *testing.T) (accepted *socketConn, client net.Conn) {
	t.Helper()
	ln := listen(t)
	defer func() { _ = ln.Close() }()
	client, err := new(net.Dialer).DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn := acceptOne(t, sockets(ln))
	t.Cleanup(func() { _ = client.Close() })
	return conn.(*socketConn), client
}

func isNobody(netip.Addr) bool    { return false }
func isOther(netip.AddrPort) bool { return false }

// idle asserts that no turn is in use and none waits.
func (t *turns) idle(tb testing.TB) {
	tb.Helper()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.running != 0 || t.waiting[0].Len() != 0 || t.waiting[1].Len() != 0 {
		tb.Errorf("%d turns in use, %d and %d wait; want none", t.running, t.waiting[0].Len(), t.waiting[1].Len())
	}
}

// waitsFor waits until so many handshakes wait.
func (t *turns) waitsFor(tb testing.TB, count int) {
	tb.Helper()
	testkit.Until(tb, "handshakes wait", func() bool {
		t.mu.Lock()
		defer t.mu.Unlock()
		return t.waiting[0].Len()+t.waiting[1].Len() == count
	})
}

// Members come before strangers, and each in the order of arrival.
func TestTurnsInOrder(t *testing.T) {
	members := atomic.Bool{}
	all := newTurns(func(netip.Addr) bool { return members.Load() }, isOther)
	all.atOnce = 1
	first, _ := socketPair(t)
	if err := all.take(first); err != nil {
		t.Fatal(err)
	}
	if err := all.take(first); err != nil {
		t.Errorf("the second look for a turn: %v", err)
	}
	if err := all.take(first.Conn); err != nil {
		t.Errorf("a connection without layers: %v", err)
	}
	order := make(chan string)
	for i, name := range []string{"stranger 1", "stranger 2", "member 1", "member 2"} {
		c, _ := socketPair(t)
		members.Store(i >= 2)
		go func() {
			if err := all.take(c); err != nil {
				name = err.Error()
			}
			order <- name
			c.turn.giveBack()
			c.turn.giveBack()
		}()
		all.waitsFor(t, i+1)
	}
	select {
	case name := <-order:
		t.Fatalf("%s does not wait", name)
	default:
	}
	first.turn.giveBack()
	var got []string
	for range 4 {
		got = append(got, testkit.Receive(t, "a turn", order))
	}
	if want := []string{"member 1", "member 2", "stranger 1", "stranger 2"}; !slices.Equal(got, want) {
		t.Errorf("order %q, want %q", got, want)
	}
	testkit.Until(t, "all turns are given back", func() bool { return all.inUse() == 0 })
	all.idle(t)
}

// A handshake beyond the queue is refused. Members have a queue of their own.
func TestTurnsAreBounded(t *testing.T) {
	member := false
	all := newTurns(func(netip.Addr) bool { return member }, isOther)
	conn, other := net.Pipe()
	defer func() { _, _ = conn.Close(), other.Close() }()
	enter := func(want error) *turn {
		t.Helper()
		m := &turn{all: all}
		if err := all.enter(m, conn); !errors.Is(err, want) {
			t.Fatalf("%v, want %v", err, want)
		}
		return m
	}
	var entered []*turn
	for range all.atOnce {
		entered = append(entered, enter(nil))
	}
	for _, member = range []bool{false, true} {
		for range maxWaiting {
			entered = append(entered, enter(nil))
		}
		refused := all.refused
		if m := enter(errCrowd); all.refused != refused+1 || all.last.IsZero() || m.end() {
			t.Errorf("%d refused, want %d; the last one at %s", all.refused, refused+1, all.last)
		}
	}
	for _, m := range entered {
		if !m.end() || m.end() {
			t.Fatal("a turn does not end once")
		}
		if all.running > all.atOnce {
			t.Fatalf("%d turns in use, want at most %d", all.running, all.atOnce)
		}
	}
	all.idle(t)
}

// A handshake that waits too long is refused.
func TestTurnTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all := newTurns(isNobody, isOther)
		all.atOnce = 0
		conn, other := net.Pipe()
		defer func() { _, _ = conn.Close(), other.Close() }()
		begin := time.Now()
		if err := all.take(&socketConn{Conn: conn}); !errors.Is(err, errCrowd) || time.Since(begin) != turnTimeout {
			t.Errorf("%v after %s, want a refusal after %s", err, time.Since(begin), turnTimeout)
		}
		if all.refused != 1 || !all.last.Equal(time.Now()) {
			t.Errorf("%d refused, the last one at %s", all.refused, all.last)
		}
		all.idle(t)
	})
}

// A client that has gone while its handshake waited costs no handshake.
func TestGoneClientsGetNoTurn(t *testing.T) {
	for name, leave := range map[string]func(relayed *socketConn, client *net.TCPConn) error{
		"closed by the client": func(_ *socketConn, c *net.TCPConn) error { return c.Close() },
		"reset by the client, with bytes unread": func(_ *socketConn, c *net.TCPConn) error {
			_, err := c.Write([]byte("more"))
			return errors.Join(err, c.SetLinger(0), c.Close())
		},
		"closed by the relay": func(c *socketConn, _ *net.TCPConn) error { return c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			all := newTurns(isNobody, isOther)
			all.atOnce = 1
			first, _ := socketPair(t)
			if err := all.take(first); err != nil {
				t.Fatal(err)
			}
			c, client := socketPair(t)
			ended := make(chan error, 1)
			go func() { ended <- all.take(c) }()
			all.waitsFor(t, 1)
			if err := leave(c, client.(*net.TCPConn)); err != nil {
				t.Fatal(err)
			}
			testkit.Until(t, "the kernel knows", c.isGone)
			first.turn.giveBack()
			if err := testkit.Receive(t, "the end of the wait", ended); !errors.Is(err, errGone) {
				t.Errorf("%v, want %v", err, errGone)
			}
			if all.refused != 0 {
				t.Errorf("%d refused, want none", all.refused)
			}
			all.idle(t)
		})
	}
}

// A turn ends when the handshake waits for the client: at a Read without unread bytes,
// at a Write without room, and at Close.
func TestTurnEndsWithTheWait(t *testing.T) {
	all := newTurns(isNobody, isOther)
	for name, wait := range map[string]func(*socketConn, net.Conn){
		"Read": func(c *socketConn, client net.Conn) {
			if _, err := client.Write([]byte("ab")); err != nil {
				t.Error(err)
			}
			b := make([]byte, 1)
			if _, err := c.Read(b); err != nil {
				t.Error(err)
			}
			if err := all.take(c); err != nil {
				t.Error(err)
			}
			if _, err := c.Read(b); err != nil || all.running != 1 {
				t.Errorf("%v; a Read of unread bytes has left %d turns in use", err, all.running)
			}
			go func() { _, _ = c.Read(b) }()
		},
		"Write": func(c *socketConn, _ net.Conn) { go func() { _, _ = c.Write(make([]byte, 64<<20)) }() },
		"Close": func(c *socketConn, _ net.Conn) { _ = c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			c, client := socketPair(t)
			if err := all.take(c); err != nil {
				t.Fatal(err)
			}
			wait(c, client)
			testkit.Until(t, "the turn is given back", func() bool { return all.inUse() == 0 })
			want := error(nil)
			if name == "Close" {
				want = net.ErrClosed
			}
			if c.turn.Load() == nil != (want == nil) {
				t.Errorf("turn %v", c.turn.Load())
			}
			_ = c.Close()
			all.idle(t)
			if err := all.take(c); err != nil || all.running != 0 {
				t.Errorf("after Close: %v, %d turns in use", err, all.running)
			}
		})
	}
}

// Whatever connections do at the same time, no more than atOnce have a turn, and none is
// lost. A connection that is closed has no turn from then on.
func TestTurnsAtRandom(t *testing.T) {
	const connections, rounds = 48, 200
	all := newTurns(func(netip.Addr) bool { return rand.N(2) == 0 }, isOther)
	all.atOnce = 3
	var holders, most, granted atomic.Int64
	var wg sync.WaitGroup
	for i := range connections {
		c, client := socketPair(t)
		closes := i%3 == 0
		wg.Go(func() {
			for range rounds {
				if err := all.take(c); err != nil || closes {
					c.turn.giveBack()
					continue
				}
				granted.Add(1)
				if now := holders.Add(1); now > most.Load() {
					most.Store(now)
				}
				for range rand.N(3) {
					c.isGone() // some work
				}
				holders.Add(-1)
				c.turn.giveBack()
			}
		})
		if closes {
			wg.Go(func() {
				<-time.After(rand.N(20 * time.Millisecond))
				_ = []func() error{c.Close, client.Close}[rand.N(2)]()
			})
		}
	}
	wg.Wait()
	if most.Load() > 3 || most.Load() < 1 || granted.Load() != connections*2/3*rounds {
		t.Errorf("%d at once, want at most 3; %d granted, want %d", most.Load(), granted.Load(), connections*2/3*rounds)
	}
	all.idle(t)
}

// oneByOne returns a relay whose handshakes take turns one by one, and its listener.
// certified is called when a handshake needs the certificate, and prepare before the
// relay serves.
func oneByOne(t *testing.T, c Config, certified func(*turns), prepare func(*Relay)) (*Relay, net.Listener, *tls.Certificate) {
	t.Helper()
	cert, getCertificate := certificate(t)
	var r *Relay
	c.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		certified(r.turns)
		return getCertificate(hello)
	}
	r = newRelay(t, c)
	r.turns.atOnce = 1
	prepare(r)
	ln := listen(t)
	ended := make(chan error, 1)
	go func() { ended <- r.Serve(ln) }()
	t.Cleanup(func() {
		_ = r.Close()
		_ = testkit.Receive(t, "the end of Serve", ended)
		testkit.Until(t, "all turns are given back", func() bool { return r.turns.inUse() == 0 })
		r.turns.idle(t)
	})
	return r, ln, cert
}

// inUse is the number of turns in use.
func (t *turns) inUse() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.running
}

// dialRaw connects without TLS and sends first.
func dialRaw(t *testing.T, ln net.Listener, first ...[]byte) net.Conn {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := conn.Write(slices.Concat(first...)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// The relay answers each ClientHello in a turn, the second one of a handshake too.
// Clients that say nothing more leave the turn to others.
func TestHandshakesInTurn(t *testing.T) {
	for name, tt := range map[string]struct {
		curves []tls.CurveID // of the relay
		want   int64         // turns of each handshake
	}{
		"one hello":                   {nil, 1},
		"two hellos, for another key": {[]tls.CurveID{tls.CurveP256}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			var certified, taken atomic.Int64
			_, ln, cert := oneByOne(t, Config{}, func(all *turns) {
				certified.Add(1)
				if n := all.inUse(); n != 1 {
					t.Errorf("%d turns in use when the certificate is needed, want 1", n)
				}
			}, func(r *Relay) {
				r.tls.CurvePreferences = tt.curves
				r.turns.own = func(netip.AddrPort) bool { taken.Add(1); return false }
			})
			silent := dialRaw(t, ln, hello(t, "derp.example.com"))
			if _, err := silent.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				connect(t, ln, cert, key.NewNode())
			}
			if certified.Load() < 3 || taken.Load() != 3*tt.want+1 {
				t.Errorf("%d certificates and %d turns, want %d turns", certified.Load(), taken.Load(), 3*tt.want+1)
			}
		})
	}
}

// A panic, a refused name and a broken hello give the turn back.
func TestTurnOfAFailedHandshake(t *testing.T) {
	var fails atomic.Bool
	r, ln, cert := oneByOne(t, Config{}, func(*turns) {
		if fails.Load() {
			panic(http.ErrAbortHandler) // the only one that is not logged, once a minute
		}
	}, func(*Relay) {})
	fails.Store(true)
	config := testkit.Trust(testkit.Pool(cert))
	config.ServerName = "derp.example.com"
	if err := tls.Client(dialRaw(t, ln), config).HandshakeContext(t.Context()); err == nil {
		t.Error("a handshake with a panic succeeds")
	}
	fails.Store(false)
	config.NextProtos = []string{"nothing that the relay speaks"}
	if err := tls.Client(dialRaw(t, ln), config).HandshakeContext(t.Context()); err == nil {
		t.Error("a handshake without a common protocol succeeds")
	}
	testkit.Until(t, "the turns are given back", func() bool { return r.turns.inUse() == 0 })
	connect(t, ln, cert, key.NewNode())
}

// The relay's own handshake waits for nobody, with the PROXY protocol too. Whether a
// client is a member depends on the address in the PROXY header.
func TestOwnHandshakeNeedsNoTurn(t *testing.T) {
	for _, proxied := range []bool{false, true} {
		c := Config{ProxyProtocol: proxied, TrustedProxies: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}
		var asked atomic.Value
		r, ln, cert := oneByOne(t, c, func(*turns) {}, func(r *Relay) {
			r.turns.member = func(addr netip.Addr) bool { asked.Store(addr.Unmap()); return false }
		})
		first := &turn{all: r.turns}
		if err := r.turns.enter(first, nil); err != nil {
			t.Fatal(err)
		}
		var header []byte
		want := netip.MustParseAddr("127.0.0.1")
		if proxied {
			header = []byte("PROXY TCP4 192.0.2.7 192.0.2.1 1000 443\r\n")
			want = netip.MustParseAddr("192.0.2.7")
		}
		dialRaw(t, ln, header, hello(t, "derp.example.com"))
		r.turns.waitsFor(t, 1)
		if got := asked.Load(); got != want {
			t.Errorf("proxied %t: looked up %v, want %s", proxied, got, want)
		}
		conn, err := r.DialSelf(t.Context(), addrPort(ln.Addr()))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		config := testkit.Trust(testkit.Pool(cert))
		config.ServerName = "derp.example.com"
		ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
		defer cancel()
		if err := tls.Client(conn, config).HandshakeContext(ctx); err != nil {
			t.Errorf("proxied %t: %v", proxied, err)
		}
		if h := r.Handshakes(); h.Waiting != 1 || h.Refused != 0 {
			t.Errorf("proxied %t: %+v, want one that waits", proxied, h)
		}
		first.end()
	}
}
