package relay

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/pires/go-proxyproto"
	"github.com/rs/zerolog"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// firstWrite is a connection that keeps its first write, and has no peer.
type firstWrite struct {
	net.Conn
	first []byte
}

func (w *firstWrite) Write(p []byte) (int, error) {
	w.first = bytes.Clone(p)
	return 0, io.ErrClosedPipe
}

func (w *firstWrite) Close() error { return nil }

// hello returns the ClientHello for a server name, or for none. A client of an
// address sends no name.
func hello(t testing.TB, name string, protocols ...string) []byte {
	t.Helper()
	w := new(firstWrite)
	_ = tls.Client(w, &tls.Config{ServerName: cmp.Or(name, "203.0.113.1"), NextProtos: protocols, MinVersion: tls.VersionTLS12}).HandshakeContext(t.Context())
	return w.first
}

// derpRequest returns the first bytes of a real client without TLS.
func derpRequest(t testing.TB) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	c := testkit.URLClient(t, "http://derp.example.com/derp", key.NewNode())
	c.SetURLDialer(func(context.Context, string, string) (net.Conn, error) { return theirs, nil })
	go func() { _ = c.Connect(t.Context()) }()
	buffer := make([]byte, 4096)
	n, err := ours.Read(buffer)
	_ = ours.Close()
	if err != nil {
		t.Fatal(err)
	}
	return buffer[:n]
}

// arrival is a connection's first bytes, and what must be counted.
type arrival struct {
	config Config
	at     port
	from   string
	first  []byte
	want   Misdirection // empty: none
	client bool         // whether there is evidence of a client
}

// Each kind of misdirected client is recognized by its real first bytes. Scanners
// are counted, but are no evidence of a client.
func TestArrivals(t *testing.T) {
	const public, private = "198.51.100.7:4000", "172.18.0.2:4000"
	ours := Config{Names: []string{"derp.example.com"}}
	address := Config{Names: []string{"203.0.113.1"}}
	proxied := Config{Names: ours.Names, ProxyProtocol: true, TrustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	request := derpRequest(t)
	withoutUpgrade := []byte("GET /derp HTTP/1.0\r\nHost: 127.0.0.1:443\r\nConnection: close\r\nUser-Agent: Go-http-client/1.1\r\n\r\n")
	v1 := []byte("PROXY TCP4 198.51.100.1 203.0.113.1 4000 443\r\n")
	v2, err := proxyproto.HeaderProxyFromAddrs(2, &net.TCPAddr{IP: net.IP{198, 51, 100, 1}, Port: 1}, &net.TCPAddr{IP: net.IP{203, 0, 113, 1}, Port: 443}).Format()
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]arrival{
		"TLS on the TLS port":          {config: ours, at: tlsPort, first: hello(t, "derp.example.com")},
		"a request on the relay port":  {config: ours, at: relayPort, first: request},
		"a request on the plain port":  {config: ours, at: plainPort, first: []byte("GET /generate_204 HTTP/1.1\r\nHost: a\r\n\r\n")},
		"nothing that can be read":     {config: ours, at: tlsPort, first: []byte("SSH-2.0-x\r\n")},
		"zeros":                        {config: ours, at: relayPort, first: make([]byte, 100)},
		"a trusted proxy":              {config: proxied, at: tlsPort, from: "10.0.0.1:1", first: append(bytes.Clone(v2), request...)},
		"TLS behind a trusted proxy":   {config: proxied, at: tlsPort, from: "10.0.0.1:1", first: hello(t, "derp.example.com")},
		"no header, no trusted proxy":  {config: proxied, at: tlsPort, first: hello(t, "derp.example.com")},
		"our name on the relay port":   {config: ours, at: relayPort, first: hello(t, "derp.example.com"), want: TLSOnPlainPort, client: true},
		"our name in capitals":         {config: ours, at: relayPort, first: hello(t, "DERP.example.com"), want: TLSOnPlainPort, client: true},
		"our name on the plain port":   {config: ours, at: plainPort, first: hello(t, "derp.example.com"), want: TLSOnPlainPort, client: true},
		"no name, ours is an address":  {config: address, at: relayPort, first: hello(t, ""), want: TLSOnPlainPort, client: true},
		"no name, ours is a name":      {config: ours, at: relayPort, first: hello(t, ""), want: TLSOnPlainPort},
		"no name on the plain port":    {config: address, at: plainPort, first: hello(t, ""), want: TLSOnPlainPort},
		"another name":                 {config: ours, at: relayPort, first: hello(t, "www.example.com", "h2"), want: TLSOnPlainPort},
		"half a handshake":             {config: address, at: relayPort, first: hello(t, "")[:60], want: TLSOnPlainPort},
		"a client without TLS":         {config: ours, at: tlsPort, first: request, want: PlainOnTLSPort, client: true},
		"a client behind bare nginx":   {config: ours, at: tlsPort, first: withoutUpgrade, want: PlainOnTLSPort, client: true},
		"a scanner without TLS":        {config: ours, at: tlsPort, first: []byte("GET / HTTP/1.0\r\n\r\n"), want: PlainOnTLSPort},
		"a client of another library":  {config: ours, at: tlsPort, first: []byte("GET /derp HTTP/1.1\r\nHost: a\r\nUser-Agent: a\r\nUpgrade: DERP\r\n\r\n"), want: PlainOnTLSPort, client: true},
		"a scanner in Go":              {config: ours, at: tlsPort, first: []byte("GET /derp HTTP/1.1\r\nHost: a\r\nUser-Agent: Go-http-client/1.1\r\nAccept: */*\r\n\r\n"), want: PlainOnTLSPort},
		"a scanner that knows /derp":   {config: ours, at: tlsPort, first: []byte("GET /derp HTTP/1.1\r\nHost: a\r\nUser-Agent: curl/8.0\r\nAccept: */*\r\n\r\n"), want: PlainOnTLSPort},
		"a PROXY header, not expected": {config: ours, at: tlsPort, from: private, first: v1, want: UnexpectedProxyHeader, client: true},
		"version 2":                    {config: ours, at: relayPort, from: private, first: v2, want: UnexpectedProxyHeader, client: true},
		"from the internet":            {config: ours, at: tlsPort, first: append(bytes.Clone(v2), hello(t, "derp.example.com")...), want: UnexpectedProxyHeader, client: true},
		"from the internet, a request": {config: ours, at: relayPort, first: append(bytes.Clone(v1), request...), want: UnexpectedProxyHeader, client: true},
		"a scanner's header":           {config: ours, at: tlsPort, first: append(bytes.Clone(v1), hello(t, "")...), want: UnexpectedProxyHeader},
		"half a scanner's header":      {config: ours, at: tlsPort, first: v2[:14], want: UnexpectedProxyHeader},
		"not trusted":                  {config: proxied, at: tlsPort, from: private, first: v2, want: UntrustedProxyHeader, client: true},
		"a stranger's header":          {config: proxied, at: tlsPort, first: v2, want: UntrustedProxyHeader},
	} {
		t.Run(name, func(t *testing.T) {
			if tt.from == "" {
				tt.from = public
			}
			r := newRelay(t, tt.config)
			r.arrived(tt.at, tt.first, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(tt.from)))
			wantArrival(t, r, tt.want, tt.client)
		})
	}
}

// wantArrival checks the counters after one connection.
func wantArrival(t *testing.T, r *Relay, want Misdirection, client bool) {
	t.Helper()
	for _, s := range r.Misdirected() {
		if got := s.Count == 1; got != (s.Misdirection == want) || s.Count > 1 {
			t.Errorf("%d of %s, want one of %q", s.Count, s.Misdirection, want)
		}
		if s.Misdirection == want && s.Last.IsZero() == client {
			t.Errorf("%s as a client: %v, want %v", want, !s.Last.IsZero(), client)
		}
	}
}

// A request to /derp without Upgrade is a client's only with the marks of a DERP
// client, and only behind a proxy.
func TestArrivalsWithoutUpgrade(t *testing.T) {
	const direct = "198.51.100.7:4000"
	derphttp := http.Header{"User-Agent": {"Go-http-client/1.1"}}
	with := func(h http.Header, field, value string) http.Header {
		h = h.Clone()
		h.Set(field, value)
		return h
	}
	browser := http.Header{"User-Agent": {"Mozilla/5.0"}, "Accept": {"*/*"}}
	for name, tt := range map[string]struct {
		header http.Header
		plain  bool // no TLS: the proxy ends it
		old    bool // HTTP/1.0
		from   string
		client bool
	}{
		"a client behind a proxy that ends TLS":  {header: derphttp, plain: true, client: true},
		"a client, with its address":             {header: with(derphttp, "X-Forwarded-For", "192.0.2.1"), client: true},
		"a client behind Cloudflare":             {header: with(derphttp, "Cf-Ray", "8c0"), client: true},
		"a client behind a proxy in the network": {header: derphttp, from: "172.18.0.1:1", client: true},
		"a client's fast start":                  {header: http.Header{"Derp-Fast-Start": {"1"}, "Via": {"1.1 a"}}, client: true},
		"a client at another node":               {header: http.Header{"Ideal-Node": {"1a"}, "Via": {"1.1 a"}}, client: true},
		"a WebSocket":                            {header: with(browser, "Sec-Websocket-Protocol", "derp"), plain: true, client: true},
		"a browser":                              {header: browser, plain: true},
		"a browser's other WebSocket":            {header: with(browser, "Sec-Websocket-Protocol", "chat"), plain: true},
		"curl through the proxy":                 {header: with(with(browser, "User-Agent", "curl/8"), "X-Forwarded-For", "192.0.2.1"), plain: true},
		"a client behind bare nginx, over TLS":   {header: derphttp, old: true, client: true},
		"a scanner in Go without a proxy":        {header: derphttp},
		"an old scanner":                         {header: browser, old: true},
		"another upgrade":                        {header: with(browser, "Upgrade", "h2c"), plain: true},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRelay(t, Config{})
			req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/derp", http.NoBody)
			req.Header, req.RemoteAddr = tt.header, direct
			if tt.from != "" {
				req.RemoteAddr = tt.from
			}
			if tt.old {
				req.Proto, req.ProtoMinor = "HTTP/1.0", 0
			}
			if !tt.plain {
				req.TLS = new(tls.ConnectionState)
			}
			r.handler().ServeHTTP(httptest.NewRecorder(), req)
			wantArrival(t, r, NoUpgrade, tt.client)
		})
	}
}

// Both listeners inspect connections, with the PROXY protocol too, and no
// inspection changes a connection.
func TestArrivalsOnListeners(t *testing.T) {
	cert, getCertificate := certificate(t)
	header := "PROXY TCP4 198.51.100.1 203.0.113.1 4000 443\r\n"
	trusted := []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	request := string(derpRequest(t))
	handshake := string(hello(t, "derp.example.com"))
	for name, tt := range map[string]struct {
		config Config
		plain  bool // send to the plain listener
		send   []string
		want   Misdirection
	}{
		"plain HTTP to TLS":               {config: Config{GetCertificate: getCertificate}, send: []string{request}, want: PlainOnTLSPort},
		"plain HTTP to TLS after PROXY":   {config: Config{GetCertificate: getCertificate, ProxyProtocol: true, TrustedProxies: trusted}, send: []string{header, request}, want: PlainOnTLSPort},
		"TLS to the relay port":           {send: []string{handshake}, want: TLSOnPlainPort},
		"TLS to the plain port":           {config: Config{GetCertificate: getCertificate}, plain: true, send: []string{handshake}, want: TLSOnPlainPort},
		"TLS to the plain port, PROXY":    {config: Config{ProxyProtocol: true, TrustedProxies: trusted}, plain: true, send: []string{header + handshake}, want: TLSOnPlainPort},
		"PROXY, not expected":             {send: []string{header, request}, want: UnexpectedProxyHeader},
		"PROXY, not expected, plain port": {config: Config{GetCertificate: getCertificate}, plain: true, send: []string{header}, want: UnexpectedProxyHeader},
		"DERP on the plain port":          {config: Config{GetCertificate: getCertificate}, plain: true, send: []string{request}, want: DERPOnPlainPort},
		"PROXY, not trusted": {
			config: Config{GetCertificate: getCertificate, ProxyProtocol: true, TrustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/32")}},
			send:   []string{header}, want: UntrustedProxyHeader,
		},
	} {
		t.Run(name, func(t *testing.T) {
			tt.config.Names, tt.config.Log = []string{"derp.example.com"}, zerolog.Nop()
			ln, plain := listen(t), listen(t)
			r := start(t, tt.config, ln)
			ended := make(chan error, 1)
			go func() { ended <- r.ServePlain(plain, RedirectHandler(443)) }()
			target := ln
			if tt.plain {
				target = plain
			}
			conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", target.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			for _, part := range tt.send {
				if _, err := io.WriteString(conn, part); err != nil {
					t.Fatal(err)
				}
			}
			testkit.Until(t, "an arrival is counted", func() bool {
				for _, s := range r.Misdirected() {
					if s.Count > 0 {
						return true
					}
				}
				return false
			})
			wantArrival(t, r, tt.want, true)
		})
	}
	t.Run("clients that arrive well", func(t *testing.T) {
		ln := listen(t)
		r := start(t, Config{GetCertificate: getCertificate, Log: zerolog.Nop()}, ln)
		testkit.Exchange(t, connect(t, ln, cert, key.NewNode()), connectWebSocket(t, ln, testkit.Trust(testkit.Pool(cert))))
		for _, s := range r.Misdirected() {
			if s.Count > 0 {
				t.Errorf("%d of %s, want none", s.Count, s.Misdirection)
			}
		}
	})
}

// FuzzArrival inspects what strangers may send. Bytes that are cut off must never
// give another server name.
func FuzzArrival(f *testing.F) {
	f.Add(hello(f, "derp.example.com"))
	f.Add(hello(f, ""))
	f.Add([]byte("PROXY TCP4 198.51.100.1 203.0.113.1 4000 443\r\nGET /derp HTTP/1.1\r\n\r\n"))
	f.Add([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c"))
	peer := &net.TCPAddr{IP: net.IP{198, 51, 100, 1}, Port: 1}
	f.Fuzz(func(t *testing.T, first []byte) {
		r := &Relay{names: names{"derp.example.com"}, misdirected: newMisdirections(zerolog.Nop(), nil)}
		for _, at := range []port{tlsPort, relayPort, plainPort} {
			r.arrived(at, first, peer)
		}
		whole, known := serverName(first)
		for n := range min(len(first), 600) {
			if name, ok := serverName(first[:n]); ok && (!known || name != whole) && name != "" {
				t.Fatalf("%d bytes have the name %q, all have %q", n, name, whole)
			}
		}
	})
}

// The names in real handshakes, whole and cut off.
func TestServerName(t *testing.T) {
	for _, name := range []string{"", "a", "derp.example.com", strings.Repeat("a.", 100) + "example.com"} {
		whole := hello(t, name, "http/1.1")
		if got, ok := serverName(whole); !ok || got != name {
			t.Errorf("%q, %v; want %q", got, ok, name)
		}
		for n := range len(whole) {
			if got, ok := serverName(whole[:n]); ok && got != name {
				t.Errorf("%d bytes of %q: %q", n, name, got)
			}
		}
	}
}
