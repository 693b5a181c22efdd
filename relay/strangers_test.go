package relay

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/types/key"

	"derpd/internal/httpserver"
	"derpd/internal/testkit"
)

// dialFrom connects from a loopback address.
func dialFrom(ctx context.Context, from string, ln net.Listener) (net.Conn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	return d.DialContext(ctx, "tcp", ln.Addr().String())
}

// clientFrom is client from a loopback address.
func clientFrom(t testing.TB, from string, ln net.Listener, cert *tls.Certificate) *derphttp.Client {
	t.Helper()
	c := client(t, ln, cert, key.NewNode())
	c.SetURLDialer(func(ctx context.Context, _, _ string) (net.Conn, error) { return dialFrom(ctx, from, ln) })
	return c
}

const (
	upgradeRequest   = "GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: DERP\r\n"
	webSocketRequest = "GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: derp\r\n\r\n"
)

// ways are the ways to hold a connection without an admitted node: what is sent after
// the TLS handshake, and what comes back at once.
var ways = map[string]struct {
	noTLS   bool
	send    string
	answers bool
}{
	"TCP alone":         {noTLS: true},
	"part of a record":  {noTLS: true, send: "\x16"},
	"TLS alone":         {},
	"half a request":    {send: "GET / HTTP/1.1\r\nHost: x\r\n"},
	"half a body":       {send: "POST /derp HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab", answers: true},
	"a probe":           {send: "GET /generate_204 HTTP/1.1\r\nHost: x\r\n\r\n", answers: true},
	"HTTP upgrade":      {send: upgradeRequest + "\r\n", answers: true},
	"fast start":        {send: upgradeRequest + derp.FastStartHeader + ": 1\r\n\r\n", answers: true},
	"half a client key": {send: upgradeRequest + derp.FastStartHeader + ": 1\r\n\r\n\x02\x00\x00\x01", answers: true},
	"WebSocket":         {send: webSocketRequest, answers: true},
}

// hold connects from an address and goes one of the ways. The connection may be closed
// on the way.
func holdFrom(t *testing.T, from string, ln net.Listener, way string) net.Conn {
	t.Helper()
	conn, err := dialFrom(t.Context(), from, ln)
	if err != nil { // the reset of a refused connection may come before the end of connect
		near, far := net.Pipe()
		_ = far.Close()
		return near
	}
	t.Cleanup(func() { _ = conn.Close() })
	w := ways[way]
	_ = conn.SetDeadline(time.Now().Add(testkit.Patience))
	if !w.noTLS {
		conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
	}
	if _, err := io.WriteString(conn, w.send); err == nil && w.answers {
		_, _ = conn.Read(make([]byte, 1))
	}
	return conn
}

// Strangers who hold all connections that they can get, in every way, keep nobody out:
// not members that are connected, nor new ones from another address, nor new ones from
// their own address.
func TestStrangersKeepNobodyOut(t *testing.T) {
	for way := range ways {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			cert, getCertificate := certificate(t)
			ln := listen(t)
			r := start(t, Config{
				GetCertificate: getCertificate, Admit: admitAll, Log: zerolog.Nop(),
				Limits: Limits{Connections: 24, Strangers: 8, PerAddress: 6},
			}, ln)
			members := []*derphttp.Client{clientFrom(t, "127.0.0.1", ln, cert), clientFrom(t, "127.0.0.1", ln, cert)}
			testkit.MustAdmit(t, members...)
			var held []net.Conn
			for range 3 {
				for _, from := range []string{"127.0.0.2", "127.0.0.3", "127.0.0.4"} {
					for range 3 {
						held = append(held, holdFrom(t, from, ln, way))
					}
				}
			}
			if s := r.Places(); s.Waiting > 8 || s.Open > 10 {
				t.Errorf("%+v; want at most 8 strangers", s)
			}
			testkit.Exchange(t, members[0], members[1])

			other := clientFrom(t, "127.0.0.9", ln, cert)
			testkit.MustAdmit(t, other)
			same := clientFrom(t, "127.0.0.2", ln, cert)
			testkit.Within(t, 10*time.Second, "a member from an address of strangers", func(context.Context) error { return testkit.Admitted(t, same) })
			testkit.Exchange(t, other, same)
			again := clientFrom(t, "127.0.0.1", ln, cert)
			testkit.MustAdmit(t, again)
			testkit.Exchange(t, members[0], again)

			for _, conn := range held {
				_ = conn.Close()
			}
			testkit.Until(t, "all strangers have given their places back", func() bool { return r.Places().Waiting == 0 })
			for _, c := range append(members, other, same, again) {
				_ = c.Close()
			}
			testkit.Until(t, "all places are given back", func() bool { return r.Places().Open == 0 })
		})
	}
}

// Clients of every kind, with and without a PROXY header, are admitted. The self-check
// takes no place.
func TestPlacesOfClients(t *testing.T) {
	cert, getCertificate := certificate(t)
	ln := listen(t)
	r := start(t, Config{GetCertificate: getCertificate, Admit: admitAll, Log: zerolog.Nop(), TrustedProxies: proxies, ProxyProtocol: true}, ln)
	trust := testkit.Trust(testkit.Pool(cert))
	old := client(t, ln, cert, key.NewNode())
	old.TLSConfig = trust.Clone()
	old.TLSConfig.MaxVersion = tls.VersionTLS12 // upgrades by HTTP
	proxied := client(t, ln, cert, key.NewNode())
	proxied.SetURLDialer(func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := dialFrom(ctx, "127.0.0.9", ln)
		if err == nil {
			_, err = io.WriteString(conn, v2(t, nil))
		}
		return conn, err
	})
	testkit.MustAdmit(t, client(t, ln, cert, key.NewNode()), old, proxied)
	connectWebSocket(t, ln, trust)
	if s := r.Places(); s.Open != 4 || s.Waiting != 0 {
		t.Errorf("%+v, want 4 admitted clients", s)
	}
	if !r.places.member(netip.MustParseAddr("192.0.2.7")) || r.places.member(netip.MustParseAddr("127.0.0.9")) {
		t.Error("want the client's address known, and not that of the proxy")
	}

	own, err := r.DialSelf(t.Context(), addrPort(ln.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = own.Close() }()
	trust = trust.Clone()
	trust.ServerName = "127.0.0.1"
	if err := tls.Client(own, trust).HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := r.Places(); s.Open != 4 || s.Waiting != 0 {
		t.Errorf("%+v, want no place for the self-check", s)
	}
}

// Both listeners share the places, and a refused connection ends at once.
func TestPlainListenerSharesPlaces(t *testing.T) {
	ln, plain := listen(t), listen(t)
	r := start(t, Config{Admit: admitAll, Log: zerolog.Nop(), Limits: Limits{PerAddress: 2}}, ln)
	served := make(chan error, 1)
	go func() { served <- r.ServePlain(plain, RedirectHandler(443)) }()
	t.Cleanup(func() {
		_ = r.Close()
		if err := testkit.Receive(t, "the end of ServePlain", served); err != nil {
			t.Error(err)
		}
	})
	holdFrom(t, "127.0.0.2", ln, "TCP alone")
	holdFrom(t, "127.0.0.2", plain, "TCP alone")
	testkit.Until(t, "two places are taken", func() bool { return r.Places().Open == 2 })
	third := holdFrom(t, "127.0.0.2", plain, "TCP alone")
	if _, err := third.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the third connection: %v", err)
	}
	if s := r.Places(); s.Open != 2 || s.Limited[2] != (LimitCount{LimitPerAddress, 1, s.Limited[2].Last}) {
		t.Errorf("%+v", s)
	}
}

// A client behind a proxy counts by its own address, from a PROXY header or from
// X-Forwarded-For.
func TestPlacesBehindProxies(t *testing.T) {
	const proxy = "127.0.0.9"
	for name, headers := range map[string]bool{"PROXY header": true, "X-Forwarded-For": false} {
		t.Run(name, func(t *testing.T) {
			ln := listen(t)
			r := start(t, Config{
				TrustedProxies: proxies, ProxyProtocol: headers, Admit: admitAll, Log: zerolog.Nop(),
				Limits: Limits{PerAddress: 2, AcceptRate: 1, AcceptBurst: 4},
			}, ln)
			// request returns the status of a response, or 0 for a closed connection.
			request := func(client string) int {
				conn, err := dialFrom(t.Context(), proxy, ln)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = conn.Close() })
				_ = conn.SetDeadline(time.Now().Add(testkit.Patience))
				text := "GET /generate_204 HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: " + client + "\r\n\r\n"
				if headers {
					text = "PROXY TCP4 " + client + " 203.0.113.1 4000 443\r\n" + text
				}
				if _, err := io.WriteString(conn, text); err != nil {
					return 0
				}
				response, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil {
					return 0
				}
				_ = response.Body.Close()
				return response.StatusCode
			}
			refused := http.StatusServiceUnavailable
			if headers {
				refused = 0
			}
			for i, want := range []int{http.StatusNoContent, http.StatusNoContent, refused} {
				if got := request("192.0.2.1"); got != want {
					t.Errorf("request %d: status %d, want %d", i, got, want)
				}
			}
			for i := range 20 {
				if got := request("192.0.2." + string(rune('2'+i%7)) + string(rune('0'+i/7))); got != http.StatusNoContent {
					t.Errorf("another client: status %d", got)
				}
			}
			if count := r.places.count(LimitPerAddress); count != 1 {
				t.Errorf("the limit counts %d", count)
			}
		})
	}
}

// A connection of a proxy that loses its place ends, so that it cannot serve another
// request without a place.
func TestRefusedClientOfAProxy(t *testing.T) {
	ln := listen(t)
	start(t, Config{TrustedProxies: proxies, Log: zerolog.Nop(), Limits: Limits{AcceptRate: 1, AcceptBurst: 1}}, ln)
	conn, err := dialFrom(t.Context(), "127.0.0.9", ln)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(testkit.Patience))
	responses := bufio.NewReader(conn)
	ok := http.StatusNoContent
	for i, want := range []int{ok, ok, http.StatusServiceUnavailable, 0} {
		client := "192.0.2." + string("1213"[i])
		if _, err := io.WriteString(conn, "GET /generate_204 HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: "+client+"\r\n\r\n"); err != nil && want != 0 {
			t.Fatal(err)
		}
		response, err := http.ReadResponse(responses, nil)
		if (err != nil) != (want == 0) {
			t.Fatalf("request %d: %v", i, err)
		}
		if err != nil {
			break
		}
		_, err = io.Copy(io.Discard, response.Body)
		_ = response.Body.Close()
		if err != nil || response.StatusCode != want {
			t.Errorf("request %d: status %d, want %d; %v", i, response.StatusCode, want, err)
		}
	}
}

// A node of the mesh that this one has reached is known.
func TestMeshAddressIsKnown(t *testing.T) {
	r := newRelay(t, Config{Admit: admitAll, Log: zerolog.Nop()})
	r.mesh.dialed(netip.MustParseAddr("192.0.2.1"))
	if !r.places.member(netip.MustParseAddr("192.0.2.1")) || r.places.member(netip.MustParseAddr("192.0.2.2")) {
		t.Error("want the address of the node known, and no other")
	}
}

// pipeListener accepts one end of a pipe.
type pipeListener struct {
	net.Listener
	conns chan net.Conn
}

func (l pipeListener) Accept() (net.Conn, error) {
	if conn, ok := <-l.conns; ok {
		return conn, nil
	}
	return nil, net.ErrClosed
}

func (l pipeListener) Addr() net.Addr { return &net.TCPAddr{} }
func (l pipeListener) Close() error   { return nil }

// Each step before admission has a time: 5 seconds for the handshake and for the request,
// 3 for another request, and 10 for the node key.
func TestTimeBeforeAdmission(t *testing.T) {
	cert := testkit.SelfSigned(t, "derp.example.com")
	for name, tt := range map[string]struct {
		way   string
		drip  byte          // sent every second; 0: nothing
		after time.Duration // wait before the way
		want  time.Duration // from the begin
	}{
		"TCP alone":                   {way: "TCP alone", want: 5 * time.Second},
		"a handshake, byte by byte":   {way: "part of a record", drip: 3, want: 5 * time.Second},
		"a late handshake":            {way: "TLS alone", after: 4 * time.Second, want: 9 * time.Second},
		"half a request":              {way: "half a request", want: 5 * time.Second},
		"half a request, late":        {way: "half a request", after: 4 * time.Second, want: 9 * time.Second},
		"headers, byte by byte":       {way: "half a request", drip: 'x', want: 5 * time.Second},
		"a body that does not come":   {way: "half a body", want: 5 * time.Second},
		"a probe":                     {way: "a probe", want: 3 * time.Second},
		"after a probe, byte by byte": {way: "a probe", drip: 'G', want: 3 * time.Second},
		"upgraded and silent":         {way: "HTTP upgrade", want: 10 * time.Second},
		"upgraded and silent, late":   {way: "HTTP upgrade", after: 4 * time.Second, want: 14 * time.Second},
		"fast start and silent":       {way: "fast start", want: 10 * time.Second},
		"a client key, byte by byte":  {way: "half a client key", drip: 0xff, want: 10 * time.Second},
		"WebSocket and silent":        {way: "WebSocket", want: 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRelay(t, Config{
					GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil },
					Admit:          admitAll, Log: zerolog.Nop(),
				})
				ln := pipeListener{conns: make(chan net.Conn)}
				served := make(chan error, 1)
				go func() { served <- r.Serve(ln) }()
				defer func() {
					close(ln.conns)
					_ = r.Close()
					if err := <-served; err != nil && !errors.Is(err, net.ErrClosed) {
						t.Error(err)
					}
					<-time.After(time.Minute) // net/http waits before it closes some connections
				}()
				near, far := net.Pipe()
				ln.conns <- far
				begun := time.Now()
				<-time.After(tt.after)
				conn := near
				way := ways[tt.way]
				if !way.noTLS {
					conn = tls.Client(near, &tls.Config{InsecureSkipVerify: true})
				}
				if _, err := io.WriteString(conn, way.send); err != nil {
					t.Fatal(err)
				}
				ended := make(chan struct{})
				go func() {
					_, _ = io.Copy(io.Discard, conn)
					close(ended)
				}()
				for open := true; open; {
					select {
					case <-ended:
						open = false
					case <-time.After(time.Second):
						if tt.drip != 0 {
							_, _ = conn.Write([]byte{tt.drip})
						}
					}
				}
				if took := time.Since(begun); took < tt.want || took >= tt.want+time.Second {
					t.Errorf("the connection ended after %s, want %s", took, tt.want)
				}
				_ = near.Close()
			})
		})
	}
}

// Both servers have the limits of public listeners.
func TestServersArePublic(t *testing.T) {
	r := newRelay(t, Config{Log: zerolog.Nop()})
	want := httpserver.Public(nil, zerolog.Nop())
	for _, server := range []*http.Server{r.public, r.plain} {
		if server.ReadTimeout != want.ReadTimeout || server.IdleTimeout != want.IdleTimeout || server.MaxHeaderBytes != want.MaxHeaderBytes {
			t.Errorf("%+v, want the limits of %+v", server, want)
		}
	}
}

// Only the probes keep a connection for another request.
func TestKeepAlive(t *testing.T) {
	r := newRelay(t, Config{Log: zerolog.Nop()})
	r.plain.Handler = r.withoutDERP(RedirectHandler(443))
	transport := new(http.Transport)
	for _, tt := range []struct {
		handler http.Handler
		path    string
		kept    bool
	}{
		{r.public.Handler, "/derp/probe", true},
		{r.public.Handler, "/derp/latency-check", true},
		{r.public.Handler, "/generate_204", true},
		{r.public.Handler, "/", false},
		{r.public.Handler, "/derp", false},
		{r.public.Handler, "/derp/mesh", false},
		{r.public.Handler, "/bootstrap-dns", false},
		{r.public.Handler, "/robots.txt", false},
		{r.plain.Handler, "/generate_204", true},
		{r.plain.Handler, "/", false},
	} {
		ln := listen(t)
		server := &http.Server{Handler: tt.handler}
		go func() { _ = server.Serve(ln) }()
		response, err := transport.RoundTrip(httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+ln.Addr().String()+tt.path, http.NoBody))
		if err != nil {
			t.Fatal(err)
		}
		_ = response.Body.Close()
		if response.Close == tt.kept {
			t.Errorf("%s: the connection is closed: %t", tt.path, response.Close)
		}
		_ = server.Close()
	}
	transport.CloseIdleConnections()
}

// A connection ends after some probes, so that the rate of new connections limits probes
// too. Both listeners count them.
func TestProbesOfAConnection(t *testing.T) {
	r := newRelay(t, Config{Log: zerolog.Nop()})
	public, plain := listen(t), listen(t)
	go func() { _ = r.Serve(public) }()
	go func() { _ = r.ServePlain(plain, RedirectHandler(443)) }()
	t.Cleanup(func() { _ = r.Close() })
	for _, ln := range []net.Listener{public, plain} {
		conn, err := dialFrom(t.Context(), "127.0.0.1", ln)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		_ = conn.SetDeadline(time.Now().Add(testkit.Patience))
		if _, err := io.WriteString(conn, strings.Repeat("GET /generate_204 HTTP/1.1\r\nHost: x\r\n\r\n", maxProbes+5)); err != nil {
			t.Fatal(err)
		}
		responses := bufio.NewReader(conn)
		for i := range maxProbes {
			response, err := http.ReadResponse(responses, nil)
			if err != nil {
				t.Fatal(err)
			}
			_ = response.Body.Close()
			if last := i == maxProbes-1; response.Close != last {
				t.Errorf("probe %d: the connection is closed: %t", i+1, response.Close)
			}
		}
		if b, err := io.ReadAll(responses); len(b) > 0 || os.IsTimeout(err) {
			t.Errorf("after the last probe: %q, %v", b, err)
		}
	}
}
