package relay

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pires/go-proxyproto"
	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/netmon"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"derpd/internal/testkit"
)

// proxies are the trusted ones. 127.0.0.8 and the rest of loopback are not.
var proxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.9/32"), netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")}

// v2 returns a header of version 2.
func v2(t *testing.T, change func(*proxyproto.Header)) string {
	t.Helper()
	h := &proxyproto.Header{
		Version: 2, Command: proxyproto.PROXY, TransportProtocol: proxyproto.TCPv4,
		SourceAddr:      &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 4000},
		DestinationAddr: &net.TCPAddr{IP: net.IPv4(203, 0, 113, 1), Port: 443},
	}
	if change != nil {
		change(h)
	}
	text, err := h.Format()
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// proxiedRelay is a relay behind the proxies. Its admission sends the address of
// each client to asked.
type proxiedRelay struct {
	relay *Relay
	addr  string
	asked chan netip.Addr
	log   *testkit.Buffer
}

// startProxied starts a relay that reads PROXY headers, or else X-Forwarded-For.
func startProxied(t *testing.T, headers bool) *proxiedRelay {
	t.Helper()
	p := &proxiedRelay{asked: make(chan netip.Addr, 1), log: new(testkit.Buffer)}
	ln := listen(t)
	p.addr = ln.Addr().String()
	p.relay = start(t, Config{
		TrustedProxies: proxies, ProxyProtocol: headers, Log: zerolog.New(p.log),
		Admit: func(_ context.Context, _ key.NodePublic, addr netip.Addr) error {
			p.asked <- addr
			return nil
		},
	}, ln)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.relay.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := testkit.Receive(t, "the end of Run", ended); err != nil {
			t.Error(err)
		}
	})
	return p
}

// dial connects from a loopback address and sends the first bytes.
func (p *proxiedRelay) dial(ctx context.Context, from, first string) (net.Conn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := d.DialContext(ctx, "tcp", p.addr)
	if err == nil && first != "" {
		_, err = io.WriteString(conn, first)
	}
	return conn, err
}

// connect connects a client, and returns its address as admission has it and as
// the list of clients has it.
func (p *proxiedRelay) connect(t *testing.T, from, first string) (asked, listed netip.Addr, err error) {
	t.Helper()
	private := key.NewNode()
	c, err := derphttp.NewClient(private, "http://"+p.addr+"/derp", logger.Discard, netmon.NewStatic())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	c.SetURLDialer(func(ctx context.Context, _, _ string) (net.Conn, error) { return p.dial(ctx, from, first) })
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	if err := c.Connect(ctx); err != nil {
		return asked, listed, err
	}
	if _, err := c.Recv(); err != nil {
		return asked, listed, err
	}
	asked = <-p.asked
	testkit.Until(t, "the client is listed", func() (ok bool) {
		listed, ok = p.relay.Clients()[private.Public()]
		return ok
	})
	return asked, listed.Unmap(), nil
}

// The address of a client is the one in the header of a trusted proxy, or else
// the one of the peer. Any other header closes the connection, and no other
// connection.
func TestProxyProtocol(t *testing.T) {
	const proxy, stranger = "127.0.0.9", "127.0.0.8"
	p := startProxied(t, true)
	for name, tt := range map[string]struct {
		from, first string
		want        string // empty: closed
	}{
		"version 1":          {proxy, "PROXY TCP4 192.0.2.7 203.0.113.1 4000 443\r\n", "192.0.2.7"},
		"version 1, IPv6":    {proxy, "PROXY TCP6 2001:db8::7 2001:db8::1 4000 443\r\n", "2001:db8::7"},
		"version 1, unknown": {proxy, "PROXY UNKNOWN\r\n", proxy},
		"version 2":          {proxy, v2(t, nil), "192.0.2.7"},
		"version 2, IPv6": {proxy, v2(t, func(h *proxyproto.Header) {
			h.TransportProtocol = proxyproto.TCPv6
			h.SourceAddr = &net.TCPAddr{IP: net.ParseIP("2001:db8::7"), Port: 4000}
			h.DestinationAddr = &net.TCPAddr{IP: net.ParseIP("2001:db8::1"), Port: 443}
		}), "2001:db8::7"},
		"version 2 with more in it": {proxy, v2(t, func(h *proxyproto.Header) {
			if err := h.SetTLVs([]proxyproto.TLV{{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte("derp.example.com")}, {Type: proxyproto.PP2_TYPE_NOOP, Value: make([]byte, 1000)}}); err != nil {
				t.Fatal(err)
			}
		}), "192.0.2.7"},
		"version 2, the proxy's own": {proxy, v2(t, func(h *proxyproto.Header) { h.Command = proxyproto.LOCAL }), proxy},
		"version 2, unix": {proxy, v2(t, func(h *proxyproto.Header) {
			h.TransportProtocol = proxyproto.UnixStream
			h.SourceAddr, h.DestinationAddr = &net.UnixAddr{Net: "unix", Name: "/a"}, &net.UnixAddr{Net: "unix", Name: "/b"}
		}), proxy},
		"no header": {proxy, "", proxy},

		"nonsense":                {proxy, "PROXY nonsense\r\n", ""},
		"no address":              {proxy, "PROXY TCP4 derp.example.com 203.0.113.1 4000 443\r\n", ""},
		"no end":                  {proxy, "PROXY " + strings.Repeat("a", 5000), ""},
		"version 3":               {proxy, strings.Replace(v2(t, nil), "QUIT\n\x21", "QUIT\n\x31", 1), ""},
		"version 2, too long":     {proxy, strings.Replace(v2(t, nil), "\x00\x0c", "\xff\xff", 1), ""},
		"version 2, no family":    {proxy, strings.Replace(v2(t, nil), "\x11\x00\x0c", "\x41\x00\x0c", 1), ""},
		"version 2, family short": {proxy, strings.Replace(v2(t, nil), "\x00\x0c", "\x00\x04", 1), ""},

		"a stranger":                       {stranger, "", stranger},
		"a stranger, version 1":            {stranger, "PROXY TCP4 192.0.2.7 203.0.113.1 4000 443\r\n", ""},
		"a stranger, version 2":            {stranger, v2(t, nil), ""},
		"a stranger, version 2, its own":   {stranger, v2(t, func(h *proxyproto.Header) { h.Command = proxyproto.LOCAL }), ""},
		"a stranger, and nonsense":         {stranger, "PROXY nonsense\r\n", ""},
		"two headers":                      {proxy, v2(t, nil) + v2(t, nil), ""},
		"a client's header behind a proxy": {proxy, v2(t, nil) + "PROXY TCP4 198.51.100.1 203.0.113.1 4000 443\r\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			asked, listed, err := p.connect(t, tt.from, tt.first)
			switch {
			case tt.want == "":
				if err == nil {
					t.Errorf("connected as %s", asked)
				}
			case err != nil:
				t.Error(err)
			case asked.String() != tt.want || listed != asked:
				t.Errorf("admission sees %s, the list has %s, want %s", asked, listed, tt.want)
			}
		})
	}
	if log := p.log.String(); !strings.Contains(log, `"level":"debug","error":"proxyproto: upstream connection sent PROXY header but isn't allowed to send one","peer":"127.0.0.8:`) {
		t.Errorf("the log lacks the refused header:\n%s", log)
	}
}

// A connection without a header, or with half of one, blocks no other.
func TestSlowProxyHeader(t *testing.T) {
	p := startProxied(t, true)
	began := time.Now()
	for _, first := range []string{"", "P", "PROXY TCP4 192.0.2.7", v2(t, nil)[:14]} {
		for _, from := range []string{"127.0.0.9", "127.0.0.8"} {
			conn, err := p.dial(t.Context(), from, first)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = conn.Close() })
		}
	}
	if asked, _, err := p.connect(t, "127.0.0.9", v2(t, nil)); err != nil || asked.String() != "192.0.2.7" {
		t.Errorf("connected as %s, %v", asked, err)
	}
	if took := time.Since(began); took >= proxyHeaderTimeout {
		t.Errorf("a client waited %s for other connections", took)
	}
}

// A header may arrive in pieces, and so may the bytes after it.
func TestProxyHeaderInPieces(t *testing.T) {
	client, server := net.Pipe()
	ln := &oneConn{fakePeer{server, netip.MustParseAddrPort("127.0.0.9:1")}}
	conn, err := (&proxyListener{ln, proxies, nil, nil, zerolog.Nop()}).Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	sent := v2(t, nil) + "hello"
	go func() {
		for _, b := range []byte(sent) {
			if _, err := client.Write([]byte{b}); err != nil {
				return
			}
		}
		_ = client.Close()
	}()
	if got := conn.RemoteAddr().String(); got != "192.0.2.7:4000" {
		t.Errorf("the client is %s", got)
	}
	if got := conn.LocalAddr().String(); got != "203.0.113.1:443" {
		t.Errorf("the client dialled %s", got)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "hello" {
		t.Errorf("read %q, %v", got, err)
	}
}

// oneConn is a listener that accepts one connection.
type oneConn struct{ conn net.Conn }

func (l *oneConn) Accept() (net.Conn, error) { return l.conn, nil }
func (l *oneConn) Close() error              { return nil }
func (l *oneConn) Addr() net.Addr            { return l.conn.LocalAddr() }

// fakePeer is a connection from a given address.
type fakePeer struct {
	net.Conn
	peer netip.AddrPort
}

func (c fakePeer) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.peer) }
func (c fakePeer) LocalAddr() net.Addr  { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 443} }

// sentConn is a connection whose peer has sent all its bytes.
type sentConn struct {
	fakePeer
	sent *bytes.Reader
}

func (c sentConn) Read(b []byte) (int, error)      { return c.sent.Read(b) }
func (c sentConn) SetReadDeadline(time.Time) error { return nil }
func (c sentConn) Close() error                    { return nil }

// FuzzProxyProtocol sends any first bytes. The addresses are always valid, an
// untrusted peer keeps its own, and the bytes after the header pass unchanged.
func FuzzProxyProtocol(f *testing.F) {
	f.Add([]byte("PROXY TCP4 192.0.2.7 203.0.113.1 4000 443\r\nGET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte("PROXY UNKNOWN\r\n"))
	f.Add([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x07\xcb\x00\x71\x01\x0f\xa0\x01\xbbhello"))
	f.Add([]byte("\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00hello"))
	f.Add(append([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x31\x00\xd8"), make([]byte, 216)...))
	f.Add([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x12\x00\x0c\xc0\x00\x02\x07\xcb\x00\x71\x01\x0f\xa0\x01\xbbhello"))
	f.Add([]byte("\x16\x03\x01\x02\x00\x01"))
	f.Fuzz(func(t *testing.T, sent []byte) {
		for _, from := range []string{"127.0.0.9:1", "[::ffff:127.0.0.9]:1", "127.0.0.8:1"} {
			peer := netip.MustParseAddrPort(from)
			conn, err := (&proxyListener{&oneConn{sentConn{fakePeer{peer: peer}, bytes.NewReader(sent)}}, proxies, nil, nil, zerolog.Nop()}).Accept()
			if err != nil {
				t.Fatal(err)
			}
			client, err := netip.ParseAddrPort(conn.RemoteAddr().String())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := netip.ParseAddrPort(conn.LocalAddr().String()); err != nil {
				t.Fatal(err)
			}
			passed, err := io.ReadAll(conn)
			own := netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port())
			switch {
			case err != nil && (len(passed) > 0 || client != own):
				t.Errorf("refused, and passed %q as %s", passed, client)
			case err != nil:
			case !bytes.HasSuffix(sent, passed):
				t.Errorf("passed %q", passed)
			case !contains(proxies, peer.Addr()) && (client != own || len(passed) != len(sent)):
				t.Errorf("a stranger is %s and passed %q", client, passed)
			}
		}
	})
}

// The plain listener reads the PROXY header too.
func TestProxyProtocolOfPlainHTTP(t *testing.T) {
	r := newRelay(t, Config{TrustedProxies: proxies, ProxyProtocol: true, Log: zerolog.Nop()})
	ln := listen(t)
	ended := make(chan error, 1)
	client := make(chan string, 1)
	go func() {
		ended <- r.ServePlain(ln, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { client <- r.RemoteAddr }))
	}()
	p := &proxiedRelay{addr: ln.Addr().String()}
	conn, err := p.dial(t.Context(), "127.0.0.9", v2(t, nil)+"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if got := testkit.Receive(t, "a request", client); got != "192.0.2.7:4000" {
		t.Errorf("the client is %s, want 192.0.2.7:4000", got)
	}
	_ = r.Close()
	if err := testkit.Receive(t, "the end of ServePlain", ended); err != nil {
		t.Error(err)
	}
}

// A client that sends more than the server reads gets the response, and then the
// end of the connection, not a reset.
func TestResponseBeforeClose(t *testing.T) {
	for name, c := range map[string]Config{
		"plain HTTP":     {Log: zerolog.Nop()},
		"behind a proxy": {TrustedProxies: proxies, ProxyProtocol: true, Log: zerolog.Nop()},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRelay(t, c)
			ln := listen(t)
			ended := make(chan error, 1)
			go func() { ended <- r.ServePlain(ln, http.NotFoundHandler()) }()
			conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n", strings.Repeat("a", 64<<10)); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 431 ") {
				t.Errorf("got %q, %v", got, err)
			}
			_ = r.Close()
			if err := testkit.Receive(t, "the end of ServePlain", ended); err != nil {
				t.Error(err)
			}
		})
	}
}

// The wait for a header ends after five seconds. The address is then that of the
// peer.
func TestProxyHeaderTimeout(t *testing.T) {
	for _, sent := range []string{"", "P", v2(t, nil)[:14]} {
		for _, peer := range []string{"127.0.0.9:1", "127.0.0.8:1"} {
			synctest.Test(t, func(t *testing.T) {
				client, server := net.Pipe()
				conn, err := (&proxyListener{&oneConn{fakePeer{tcpLike{server}, netip.MustParseAddrPort(peer)}}, proxies, nil, nil, zerolog.Nop()}).Accept()
				if err != nil {
					t.Fatal(err)
				}
				go func() { _, _ = io.WriteString(client, sent) }()
				begun := time.Now()
				if got := conn.RemoteAddr().String(); got != peer {
					t.Errorf("after %q the client is %s, want %s", sent, got, peer)
				}
				if took := time.Since(begun); took != 5*time.Second {
					t.Errorf("%s: after %q the header took %v, want 5s", peer, sent, took)
				}
				_ = client.Close()
				_ = conn.Close()
			})
		}
	}
}

// tcpLike is a pipe whose reads of no bytes return at once, as those of TCP do.
type tcpLike struct{ net.Conn }

func (c tcpLike) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	return c.Conn.Read(p)
}

// upgradeFrom connects a DERP client with a request of its own.
func (p *proxiedRelay) upgradeFrom(t *testing.T, from, first, forwardedFor string) (asked netip.Addr, s *session) {
	t.Helper()
	conn, err := p.dial(t.Context(), from, first)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := io.WriteString(conn, "GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: DERP\r\nX-Forwarded-For: "+forwardedFor+"\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	brw := bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn))
	res, err := http.ReadResponse(brw.Reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	c, err := derp.NewClient(key.NewNode(), conn, brw, logger.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if message, err := c.Recv(); err != nil {
		t.Fatalf("%v, %v", message, err)
	}
	return testkit.Receive(t, "a question of admission", p.asked), onlySession(t, p.relay)
}

// Only trusted proxies set the address of a client: with X-Forwarded-For or with the
// PROXY header, never with both.
func TestClientAddress(t *testing.T) {
	const proxy, stranger = "127.0.0.9", "127.0.0.8"
	for name, tt := range map[string]struct {
		headers      bool
		from, first  string
		forwardedFor string
		want         string
	}{
		"X-Forwarded-For":                       {false, proxy, "", "198.51.100.1, 192.0.2.7", "192.0.2.7"},
		"X-Forwarded-For of a stranger":         {false, stranger, "", "192.0.2.7", stranger},
		"PROXY header":                          {true, proxy, v2(t, nil), "198.51.100.1", "192.0.2.7"},
		"X-Forwarded-For with the PROXY option": {true, proxy, "", "198.51.100.1", proxy},
	} {
		t.Run(name, func(t *testing.T) {
			p := startProxied(t, tt.headers)
			asked, s := p.upgradeFrom(t, tt.from, tt.first, tt.forwardedFor)
			if asked.String() != tt.want {
				t.Errorf("admission is asked about %s, want %s", asked, tt.want)
			}
			if got := netip.MustParseAddrPort(s.RemoteAddr().String()).Addr(); got != asked {
				t.Errorf("the session is of %s, want %s", got, asked)
			}
		})
	}
}
