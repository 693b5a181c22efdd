package relay

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/tcpinfo"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// newRelay returns a relay with what every configuration needs.
func newRelay(t testing.TB, c Config) *Relay {
	t.Helper()
	if c.Home == nil {
		home, err := Home("blank")
		if err != nil {
			t.Fatal(err)
		}
		c.Home = home
	}
	c.BootstrapDNS = NewBootstrapDNS(nil, zerolog.Nop())
	if c.PrivateKey.IsZero() {
		c.PrivateKey = key.NewNode()
	}
	r, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// listen returns a listener on a free port.
func listen(t testing.TB) net.Listener {
	t.Helper()
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// start serves ln with a new relay until the test ends.
func start(t testing.TB, c Config, ln net.Listener) *Relay {
	t.Helper()
	r := newRelay(t, c)
	serve(t, r, ln)
	return r
}

// serve serves ln until the test ends.
func serve(t testing.TB, r *Relay, ln net.Listener) {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- r.Serve(ln) }()
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if err := testkit.Receive(t, "the end of Serve", ended); err != nil {
			t.Errorf("Serve returned %v", err)
		}
	})
}

// client returns a client that has not connected. Without a certificate it
// connects without TLS.
func client(t testing.TB, ln net.Listener, cert *tls.Certificate, private key.NodePrivate) *derphttp.Client {
	t.Helper()
	scheme := "http://"
	if cert != nil {
		scheme = "https://"
	}
	c := testkit.URLClient(t, scheme+ln.Addr().String()+"/derp", private)
	if cert != nil {
		c.TLSConfig = testkit.Trust(testkit.Pool(cert))
	}
	return c
}

// connect returns a client that is connected.
func connect(t testing.TB, ln net.Listener, cert *tls.Certificate, private key.NodePrivate) *derphttp.Client {
	t.Helper()
	c := client(t, ln, cert, private)
	testkit.MustAdmit(t, c)
	return c
}

// certificate returns a certificate and the function that serves it.
func certificate(t testing.TB) (*tls.Certificate, func(*tls.ClientHelloInfo) (*tls.Certificate, error)) {
	cert := testkit.SelfSigned(t, "127.0.0.1", "derp.example.com")
	return cert, func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil }
}

// dialTLS returns a TLS connection, without a request.
func dialTLS(t testing.TB, ln net.Listener, config *tls.Config) *tls.Conn {
	t.Helper()
	conn, err := (&tls.Dialer{Config: config}).DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn.(*tls.Conn)
}

// status returns the status code of a GET request.
func status(t *testing.T, c *http.Client, url string) int {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	response, err := c.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	_ = response.Body.Close()
	return response.StatusCode
}

func connectWebSocket(t *testing.T, ln net.Listener, config *tls.Config) testkit.WebSocket {
	t.Helper()
	return testkit.WebSocketClient(t, "wss://"+ln.Addr().String()+"/derp", &http.Transport{TLSClientConfig: config}, nil)
}

// DERP clients of every kind and HTTP clients share one listener.
func TestServe(t *testing.T) {
	cert, getCertificate := certificate(t)
	ln := listen(t)
	start(t, Config{GetCertificate: getCertificate, Log: zerolog.Nop()}, ln)
	trust := testkit.Trust(testkit.Pool(cert))
	old := trust.Clone()
	old.MaxVersion = tls.VersionTLS12

	fast := connect(t, ln, cert, key.NewNode())
	t.Run("fast start", func(t *testing.T) {
		testkit.Exchange(t, fast, connect(t, ln, cert, key.NewNode()))
		state, _ := fast.TLSConnectionState()
		if chain := state.PeerCertificates; len(chain) != 2 || !strings.HasPrefix(chain[1].Subject.CommonName, "derpkey") {
			t.Error("the meta certificate is missing")
		}
	})
	t.Run("HTTP upgrade", func(t *testing.T) {
		// Below TLS 1.3, clients ignore the meta certificate.
		c := client(t, ln, cert, key.NewNode())
		c.TLSConfig = old
		testkit.MustAdmit(t, c)
		testkit.Exchange(t, fast, c)
	})
	t.Run("WebSocket", func(t *testing.T) {
		testkit.Exchange(t, fast, connectWebSocket(t, ln, trust))
	})
	t.Run("HTTP", func(t *testing.T) {
		transport := &http.Transport{TLSClientConfig: trust}
		defer transport.CloseIdleConnections()
		for range 3 { // on one connection
			if got := status(t, &http.Client{Transport: transport}, "https://"+ln.Addr().String()+"/generate_204"); got != http.StatusNoContent {
				t.Error(got)
			}
		}
	})
	t.Run("HTTP/2 is not offered", func(t *testing.T) {
		config := trust.Clone()
		config.NextProtos = []string{"h2", "http/1.1"}
		if got := dialTLS(t, ln, config).ConnectionState().NegotiatedProtocol; got != "http/1.1" {
			t.Errorf("negotiated %q", got)
		}
	})
	t.Run("HTTP without TLS", func(t *testing.T) {
		if got := status(t, http.DefaultClient, "http://"+ln.Addr().String()); got != http.StatusBadRequest {
			t.Error(got)
		}
	})
	// Without the fast start, so that there is a response.
	head := "GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: DERP\r\n\r\n"
	for name, parts := range map[string][]string{
		"in one write":  {head},
		"in parts":      {head[:1], head[1:30], head[30:]},
		"long header":   {head[:len(head)-2] + "User-Agent: " + strings.Repeat("x", 8000) + "\r\n\r\n"},
		"unknown field": {head[:len(head)-2] + "X-Unknown: 1\r\n\r\n"},
	} {
		t.Run("request "+name, func(t *testing.T) {
			conn := dialTLS(t, ln, trust)
			for _, part := range parts {
				if _, err := io.WriteString(conn, part); err != nil {
					t.Fatal(err)
				}
			}
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			_ = response.Body.Close()
			if response.StatusCode != http.StatusSwitchingProtocols || response.Header.Get("Derp-Public-Key") == "" {
				t.Errorf("%s %v", response.Status, response.Header)
			}
		})
	}
	// Close ends connections without a request, such as this one.
	dialTLS(t, ln, trust)
}

// The certificate of a TLS-ALPN-01 challenge is sent alone, and any other certificate
// with the meta certificate.
func TestChallengeCertificate(t *testing.T) {
	cert, getCertificate := certificate(t)
	ln := listen(t)
	start(t, Config{GetCertificate: getCertificate, Log: zerolog.Nop()}, ln)
	for protocol, want := range map[string]int{"acme-tls/1": 1, "http/1.1": 2} {
		config := testkit.Trust(testkit.Pool(cert))
		config.NextProtos = []string{protocol}
		state := dialTLS(t, ln, config).ConnectionState()
		if len(state.PeerCertificates) != want || state.NegotiatedProtocol != protocol {
			t.Errorf("%s: %d certificates, negotiated %q, want %d", protocol, len(state.PeerCertificates), state.NegotiatedProtocol, want)
		}
	}
}

// The relay refuses TLS 1.0 and 1.1 with the alert for versions, and accepts 1.2
// and 1.3 on the same listener.
func TestTLSVersions(t *testing.T) {
	cert, getCertificate := certificate(t)
	ln := listen(t)
	start(t, Config{GetCertificate: getCertificate, Log: zerolog.Nop()}, ln)
	for version, accepted := range map[uint16]bool{
		tls.VersionTLS10: false, tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true,
	} {
		config := testkit.Trust(testkit.Pool(cert))
		config.MinVersion, config.MaxVersion = version, version
		conn, err := (&tls.Dialer{Config: config}).DialContext(t.Context(), "tcp", ln.Addr().String())
		if err == nil {
			_ = conn.Close()
		}
		alert := err != nil && strings.Contains(err.Error(), "remote error: tls: protocol version not supported")
		if accepted && err != nil || !accepted && !alert {
			t.Errorf("%s: %v", tls.VersionName(version), err)
		}
	}
}

// Admission is asked about the key and the address of each client, and an error
// refuses the client.
func TestServeAdmission(t *testing.T) {
	cert, getCertificate := certificate(t)
	type question struct {
		node key.NodePublic
		from netip.Addr
	}
	asked := make(chan question, 1)
	member := key.NewNode()
	ln := listen(t)
	start(t, Config{GetCertificate: getCertificate, Log: zerolog.Nop(), Admit: func(_ context.Context, node key.NodePublic, from netip.Addr) error {
		asked <- question{node, from}
		if node != member.Public() {
			return errors.New("not a member")
		}
		return nil
	}}, ln)
	for _, private := range []key.NodePrivate{member, key.NewNode()} {
		err := testkit.Admitted(t, client(t, ln, cert, private))
		if want := private.Equal(member); (err == nil) != want {
			t.Errorf("member %v: %v", want, err)
		}
		if q := testkit.Receive(t, "a question", asked); q.node != private.Public() || q.from != netip.MustParseAddr("127.0.0.1") {
			t.Errorf("asked about %v, want %v of 127.0.0.1", q, private.Public())
		}
	}
}

// Two relays in one process ask their own admission functions.
func TestAdmissionOfTwoRelays(t *testing.T) {
	deny := func(context.Context, key.NodePublic, netip.Addr) error { return errors.New("closed") }
	allow := func(context.Context, key.NodePublic, netip.Addr) error { return nil }
	for _, tt := range []struct {
		name  string
		admit AdmitFunc
		want  bool
	}{{"open", nil, true}, {"deny", deny, false}, {"allow", allow, true}, {"deny again", deny, false}} {
		ln := listen(t)
		start(t, Config{Admit: tt.admit, Log: zerolog.Nop()}, ln)
		if err := testkit.Admitted(t, client(t, ln, nil, key.NewNode())); (err == nil) != tt.want {
			t.Errorf("%s: %v, want admitted %v", tt.name, err, tt.want)
		}
	}
}

// Apps are refused by name.
func TestDisallowedApps(t *testing.T) {
	ln := listen(t)
	start(t, Config{DisallowApps: []string{"unwanted"}, Log: zerolog.Nop()}, ln)
	for app, want := range map[string]bool{"": true, "wanted": true, "unwanted": false} {
		c := client(t, ln, nil, key.NewNode())
		c.AppName = app
		if err := testkit.Admitted(t, c); (err == nil) != want {
			t.Errorf("app %q: %v, want admitted %v", app, err, want)
		}
	}
}

// Close disconnects clients and ends both servers, which return nil. A relay
// that is closed serves nothing.
func TestClose(t *testing.T) {
	r := newRelay(t, Config{Log: zerolog.Nop()})
	public, plain := listen(t), listen(t)
	ended := make(chan error, 2)
	go func() { ended <- r.Serve(public) }()
	go func() { ended <- r.ServePlain(plain, RedirectHandler(443)) }()
	native := connect(t, public, nil, key.NewNode())
	noFollow := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	defer noFollow.CloseIdleConnections()
	if got := status(t, noFollow, "http://"+plain.Addr().String()); got != http.StatusFound {
		t.Errorf("the plain listener answers %d", got)
	}
	// A session that derpserver does not have yet.
	early := new(recorder)
	r.sessions.add(newSession(r.sessions, early, bufio.NewReader(nil), nil))
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	late := new(recorder)
	r.sessions.add(newSession(r.sessions, late, bufio.NewReader(nil), nil))
	if !early.closed || !late.closed {
		t.Errorf("sessions hijacked before and after Close are closed: %v, %v", early.closed, late.closed)
	}
	for range 2 {
		if err := testkit.Receive(t, "the end of a server", ended); err != nil {
			t.Error(err)
		}
	}
	if message, err := native.Recv(); err == nil {
		t.Errorf("a client of a closed relay received %T", message)
	}
	for _, ln := range []net.Listener{public, plain} {
		if conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", ln.Addr().String()); err == nil {
			_ = conn.Close()
			t.Errorf("%s accepts connections after Close", ln.Addr())
		}
	}
	another := listen(t)
	if err := r.Serve(another); err != nil {
		t.Error(err)
	}
	if _, err := another.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a listener of a closed relay: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Errorf("the second Close: %v", err)
	}
}

// Close disconnects browsers too. Their connections are not sessions.
func TestCloseWebSocket(t *testing.T) {
	cert, getCertificate := certificate(t)
	ln := listen(t)
	r := start(t, Config{GetCertificate: getCertificate, Log: zerolog.Nop()}, ln)
	c := connectWebSocket(t, ln, testkit.Trust(testkit.Pool(cert)))
	testkit.Exchange(t, c, connect(t, ln, cert, key.NewNode()))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			if _, err := c.Recv(); err != nil {
				return
			}
		}
	}()
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	testkit.Receive(t, "the end of the WebSocket", ended)
}

// slowListener closes only after release is closed, and says when it begins.
type slowListener struct {
	net.Listener
	closing, release chan struct{}
	once             sync.Once
}

func (l *slowListener) Close() error {
	l.once.Do(func() { close(l.closing) })
	<-l.release
	return l.Listener.Close()
}

// A listener that is closed while Close waits for another one is no error.
func TestListenerClosedDuringClose(t *testing.T) {
	r := newRelay(t, Config{Log: zerolog.Nop()})
	public := &slowListener{Listener: listen(t), closing: make(chan struct{}), release: make(chan struct{})}
	plain := listen(t)
	publicEnded, plainEnded, closed := make(chan error, 1), make(chan error, 1), make(chan error, 1)
	go func() { publicEnded <- r.Serve(public) }()
	go func() { plainEnded <- r.ServePlain(plain, http.NotFoundHandler()) }()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for _, ln := range []net.Listener{public, plain} { // both are served
		status(t, client, "http://"+ln.Addr().String()+"/generate_204")
	}
	go func() { closed <- r.Close() }()
	testkit.Receive(t, "the begin of Close", public.closing)
	_ = plain.Close()
	if err := testkit.Receive(t, "the end of ServePlain", plainEnded); err != nil {
		t.Errorf("ServePlain returned %v", err)
	}
	close(public.release)
	for name, ended := range map[string]chan error{"Serve": publicEnded, "Close": closed} {
		if err := testkit.Receive(t, "the end of "+name, ended); err != nil {
			t.Errorf("%s returned %v", name, err)
		}
	}
}

// A listener that fails ends Serve with its error.
func TestServeFails(t *testing.T) {
	r := newRelay(t, Config{Log: zerolog.Nop()})
	ln := listen(t)
	_ = ln.Close()
	if err := r.Serve(ln); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve returned %v", err)
	}
}

// watched accepts connections that note the deadlines set on them.
type watched struct {
	net.Listener
	conns chan *watchedConn
}

func (l watched) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &watchedConn{Conn: conn}
	l.conns <- c
	return c, nil
}

type watchedConn struct {
	net.Conn
	mu       sync.Mutex
	deadline time.Time // for reading; guarded by mu
	limited  bool      // whether there ever was one; guarded by mu
}

func (c *watchedConn) set(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline, c.limited = t, c.limited || !t.IsZero()
}

func (c *watchedConn) SetDeadline(t time.Time) error {
	c.set(t)
	return c.Conn.SetDeadline(t)
}

func (c *watchedConn) SetReadDeadline(t time.Time) error {
	c.set(t)
	return c.Conn.SetReadDeadline(t)
}

// The handshake and the request have a deadline. An admitted client has none.
func TestDeadlines(t *testing.T) {
	cert, getCertificate := certificate(t)
	ln := watched{listen(t), make(chan *watchedConn, 1)}
	start(t, Config{GetCertificate: getCertificate, Log: zerolog.Nop()}, ln)
	connect(t, ln, cert, key.NewNode())
	c := testkit.Receive(t, "a connection", ln.conns)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.limited || !c.deadline.IsZero() {
		t.Errorf("a deadline was set: %v, and it is %v now, want none", c.limited, c.deadline)
	}
}

// Failed handshakes and refused clients, with their addresses, are logged at
// debug level only.
func TestFaultsOfClientsAreDebug(t *testing.T) {
	cert, getCertificate := certificate(t)
	log := new(testkit.Buffer)
	ln := listen(t)
	start(t, Config{GetCertificate: getCertificate, Log: zerolog.New(log), Admit: func(context.Context, key.NodePublic, netip.Addr) error {
		return errors.New("not a member")
	}}, ln)
	if conn, err := (&tls.Dialer{Config: &tls.Config{MinVersion: tls.VersionTLS12}}).DialContext(t.Context(), "tcp", ln.Addr().String()); err == nil {
		_ = conn.Close()
		t.Fatal("an unknown certificate was accepted")
	}
	if err := testkit.Admitted(t, client(t, ln, cert, key.NewNode())); err == nil {
		t.Fatal("a client was admitted")
	}
	testkit.Until(t, "the faults are logged", func() bool {
		got := log.String()
		return strings.Contains(got, "TLS handshake error from 127.0.0.1:") && strings.Contains(got, "not a member") && strings.Contains(got, "client disconnected")
	})
	for line := range strings.Lines(log.String()) {
		if !strings.Contains(line, `"level":"debug"`) {
			t.Errorf("logged: %s", line)
		}
	}
}

// derpserver finds the TCP connection below a session, through every layer, to
// ask the kernel for the round trip time. The path has few layers.
func TestLayers(t *testing.T) {
	cert, getCertificate := certificate(t)
	for name, tt := range map[string]struct {
		config Config
		cert   *tls.Certificate
		want   []string
	}{
		"plain HTTP": {Config{}, nil, []string{"*relay.session", "*relay.socketConn", "*net.TCPConn"}},
		"TLS":        {Config{GetCertificate: getCertificate}, cert, []string{"*relay.session", "*tls.Conn", "*relay.socketConn", "*net.TCPConn"}},
		"TLS behind a proxy": {
			Config{GetCertificate: getCertificate, ProxyProtocol: true, TrustedProxies: proxies},
			cert,
			[]string{"*relay.session", "*tls.Conn", "*relay.proxiedConn", "*relay.socketConn", "*net.TCPConn"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			ln := listen(t)
			tt.config.Log = zerolog.Nop()
			r := start(t, tt.config, ln)
			private := key.NewNode()
			connect(t, ln, tt.cert, private)
			s := onlySession(t, r)
			if node, end := s.state(); node != private.Public() || end != nil {
				t.Errorf("the session is of %v, ended with %v", node, end)
			}
			if rtt, err := tcpinfo.RTT(s); err != nil || rtt <= 0 {
				t.Errorf("round trip time %v, %v", rtt, err)
			}
			var got []string
			for conn := net.Conn(s); conn != nil; {
				got = append(got, fmt.Sprintf("%T", conn))
				below, ok := conn.(interface{ NetConn() net.Conn })
				if !ok {
					break
				}
				conn = below.NetConn()
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("layers %v, want %v", got, tt.want)
			}
		})
	}
}

// onlySession returns the one session of a relay.
func onlySession(t *testing.T, r *Relay) *session {
	t.Helper()
	r.sessions.mu.Lock()
	defer r.sessions.mu.Unlock()
	if len(r.sessions.open) != 1 {
		t.Fatalf("%d sessions, want 1", len(r.sessions.open))
	}
	for s := range r.sessions.open {
		return s
	}
	return nil
}
