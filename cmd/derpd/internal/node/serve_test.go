package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/stun"
	"tailscale.com/net/tlsdial"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/certs"
	"derpd/cmd/derpd/internal/admin"
	"derpd/healthz"
	"derpd/internal/testkit"
	"derpd/internal/testkit/acmetest"
)

// TestPinnedByThePrintedMap starts a relay without any setting but its
// addresses. Two clients that know only the printed map exchange packets.
func TestPinnedByThePrintedMap(t *testing.T) {
	env := testkit.Environ(t)
	n := begin(t, env)
	r := region(t, parsePolicy(t, n.printed))
	if !strings.HasPrefix(r.Nodes[0].CertName, "sha256-raw:") {
		t.Fatalf("CertName %q, want a pin", r.Nodes[0].CertName)
	}
	a, _ := exchangeOver(t, r, nil)
	requireFastStart(t, a)
	if _, err := healthz.STUN(t.Context(), stunAddr(t, r.Nodes[0])); err != nil {
		t.Error(err)
	}

	t.Run("HTTP upgrade", func(t *testing.T) {
		exchangeOver(t, r, func(c *derphttp.Client) {
			c.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS12}
		})
	})
	t.Run("WebSocket", func(t *testing.T) {
		pin := &tls.Config{MinVersion: tls.VersionTLS12}
		tlsdial.SetConfigExpectedCertHash(pin, strings.TrimPrefix(r.Nodes[0].CertName, "sha256-raw:"))
		a, b := dialWebSocket(t, n, r.Nodes[0].HostName, pin), dialWebSocket(t, n, r.Nodes[0].HostName, pin)
		testkit.Exchange(t, a, b)
	})
	t.Run("another pin is refused", func(t *testing.T) {
		wrong := *r.Nodes[0]
		wrong.CertName = "sha256-raw:" + strings.Repeat("0", 64)
		if err := testkit.Admitted(t, testkit.RegionClient(t, &tailcfg.DERPRegion{RegionID: 900, Nodes: []*tailcfg.DERPNode{&wrong}}, key.NewNode())); err == nil {
			t.Error("a client with another pin connected")
		}
	})
	t.Run("restart keeps key and pin", func(t *testing.T) {
		n.stop()
		again := begin(t, env)
		if again.relay.PublicKey() != a.ServerPublicKey() {
			t.Error("the node key changed")
		}
		if got := region(t, parsePolicy(t, again.printed)).Nodes[0].CertName; got != r.Nodes[0].CertName {
			t.Error("the pin changed")
		}
	})
}

// requireFastStart checks that the client can start without an HTTP response:
// it needs TLS 1.3 and the meta certificate.
func requireFastStart(t *testing.T, c *derphttp.Client) {
	t.Helper()
	state, ok := c.TLSConnectionState()
	if !ok || state.Version != tls.VersionTLS13 {
		t.Fatalf("TLS version %x, want 1.3", state.Version)
	}
	last := state.PeerCertificates[len(state.PeerCertificates)-1]
	if !strings.HasPrefix(last.Subject.CommonName, "derpkey") {
		t.Errorf("last certificate is %q, want the meta certificate", last.Subject.CommonName)
	}
}

// TestLetsEncrypt connects clients in the three ways of DERP, with a verified
// certificate.
func TestLetsEncrypt(t *testing.T) {
	for _, challenge := range []string{"http", "tls-alpn"} {
		t.Run(challenge, func(t *testing.T) {
			authority := acmetest.Start(t)
			env := testkit.Environ(t, "DERP_DOMAIN=derp.example.com", "DERP_ACME_CA="+authority.Directory,
				"DERP_CA_ROOTS="+authority.RootsFile, "DERP_ACME_CHALLENGES="+challenge)
			n := begin(t, env, func(n *Node) {
				if n.stun.Open() {
					t.Error("STUN is open without a certificate")
				}
				if report := n.health.Report(t.Context()); report.Ready || !strings.Contains(report.Cause, "waiting for derp.example.com") {
					t.Errorf("health without a certificate: %s", report)
				}
				authority.Validate(t, port(n.listeners.http.Addr()), port(n.listeners.https.Addr()))
			})
			r := region(t, parsePolicy(t, n.printed))
			if r.Nodes[0].CertName != "" || r.Nodes[0].HostName != "derp.example.com" {
				t.Errorf("node %+v, want the domain and no CertName", r.Nodes[0])
			}
			if report := n.health.Report(t.Context()); !report.Ready {
				t.Error(report)
			}
			roots := authority.Roots()
			trust := func(c *derphttp.Client) { c.TLSConfig = testkit.Trust(roots) }

			t.Run("fast start", func(t *testing.T) {
				a, _ := exchangeOver(t, r, trust)
				requireFastStart(t, a)
			})
			t.Run("HTTP upgrade", func(t *testing.T) {
				// Clients use the meta certificate only in TLS
				// 1.3.
				exchangeOver(t, r, func(c *derphttp.Client) {
					c.TLSConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS12}
				})
			})
			t.Run("WebSocket", func(t *testing.T) {
				trusted := testkit.Trust(roots)
				a, b := dialWebSocket(t, n, "derp.example.com", trusted), dialWebSocket(t, n, "derp.example.com", trusted)
				testkit.Exchange(t, a, b)
			})
			t.Run("an unknown authority is refused", func(t *testing.T) {
				if err := testkit.Admitted(t, testkit.RegionClient(t, r, key.NewNode())); err == nil {
					t.Error("a client that does not know the authority connected")
				}
			})
		})
	}
}

// TestLetsEncryptForNamesAndAddresses connects clients that dial a name, and
// clients that dial an address and send no SNI. Each gets a certificate that it
// can verify.
func TestLetsEncryptForNamesAndAddresses(t *testing.T) {
	authority := acmetest.Start(t)
	names := []string{"derp.example.com", "127.0.0.1", "::1"}
	n := begin(t, testkit.Environ(t, "DERP_ADDR=[::]:0", "DERP_DOMAIN="+strings.Join(names, ","),
		"DERP_ACME_CA="+authority.Directory, "DERP_ACME_CA_ROOTS="+authority.RootsFile), func(n *Node) {
		authority.Validate(t, port(n.listeners.http.Addr()), port(n.listeners.https.Addr()))
	})
	roots := authority.Roots()
	for _, name := range names {
		r := region(t, parsePolicy(t, n.printed))
		r.Nodes[0].HostName = name
		r.Nodes[0].IPv4, r.Nodes[0].IPv6 = "127.0.0.1", "none"
		if name == "::1" {
			r.Nodes[0].IPv4, r.Nodes[0].IPv6 = "none", "::1"
		}
		trust := func(c *derphttp.Client) { c.TLSConfig = testkit.Trust(roots) }
		// The relay is ready with its first certificate; the others
		// come later.
		testkit.Until(t, name+" has its certificate", func() bool {
			c := testkit.RegionClient(t, r, key.NewNode())
			trust(c)
			return testkit.Admitted(t, c) == nil
		})
		exchangeOver(t, r, trust)
	}
}

func dialWebSocket(t *testing.T, n *testNode, host string, tlsConfig *tls.Config) testkit.WebSocket {
	t.Helper()
	tlsConfig = tlsConfig.Clone()
	tlsConfig.ServerName = host
	return dialWebSocketFrom(t, "", n.listeners.https.Addr().String(), tlsConfig, "")
}

// dialWebSocketFrom dials from an address of this machine, over TLS unless
// tlsConfig is nil. A claim is sent as X-Forwarded-For.
func dialWebSocketFrom(t *testing.T, from, to string, tlsConfig *tls.Config, claim string) testkit.WebSocket {
	t.Helper()
	dialer := new(net.Dialer)
	if from != "" {
		dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	transport := &http.Transport{
		TLSClientConfig: tlsConfig,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, to)
		},
	}
	target, header := "wss://derp.example.com/derp", make(http.Header)
	if tlsConfig == nil {
		target = "ws://derp.example.com/derp"
	}
	if claim != "" {
		header.Set("X-Forwarded-For", claim)
	}
	return testkit.WebSocketClient(t, target, transport, header)
}

func TestManual(t *testing.T) {
	dir := t.TempDir()
	// Both files hold the self-signed certificate and its key.
	pair("derp.example.com", "derp.example.com", time.Now())(t, dir)
	n := begin(t, testkit.Environ(t, "DERP_CERT_MODE=manual", "DERP_DOMAIN=derp.example.com", "DERP_CERT_DIR="+dir))
	r := region(t, parsePolicy(t, n.printed))
	if want := certs.Pin(n.certs.Status().Leaf); r.Nodes[0].CertName != want {
		t.Errorf("CertName %q, want %q: the file is self-signed", r.Nodes[0].CertName, want)
	}
	exchangeOver(t, r, nil)
}

// TestManualAddressWithoutFiles asserts that derpd makes a self-signed
// certificate for an address without files, as derper does.
func TestManualAddressWithoutFiles(t *testing.T) {
	n := begin(t, testkit.Environ(t, "DERP_CERT_MODE=manual", "DERP_DOMAIN=127.0.0.1"))
	r := region(t, parsePolicy(t, n.printed))
	if r.Nodes[0].HostName != "127.0.0.1" || r.Nodes[0].CertName == "" {
		t.Errorf("node %+v, want the address and a pin", r.Nodes[0])
	}
	exchangeOver(t, r, nil)
}

func TestOff(t *testing.T) {
	n := begin(t, testkit.Environ(t, "DERP_CERT_MODE=off", "DERP_DOMAIN=derp.example.com"))
	r := region(t, parsePolicy(t, n.printed))
	if r.Nodes[0].DERPPort != 0 {
		t.Errorf("DERPPort %d, want 443: what terminates TLS listens there", r.Nodes[0].DERPPort)
	}
	if report := n.health.Report(t.Context()); !report.Ready {
		t.Error(report)
	}
	// The clients connect as a TLS proxy does: by plain HTTP.
	url := "http://" + n.listeners.https.Addr().String() + "/derp"
	testkit.Exchange(t, testkit.URLClient(t, url, key.NewNode()), testkit.URLClient(t, url, key.NewNode()))
}

func TestMapFormatsAgree(t *testing.T) {
	n := begin(t, testkit.Environ(t, "DERP_REGION_ID=951", "DERP_REGION_CODE=sha", "DERP_REGION_NAME=Shanghai"))
	want := parsePolicy(t, n.printed)
	ask := func(format string) []byte {
		out, err := admin.Client{Addr: n.listeners.admin.Addr().String()}.Map(t.Context(), format)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	var fromYAML tailcfg.DERPMap
	if err := yaml.Unmarshal(ask("headscale"), &fromYAML); err != nil {
		t.Fatal(err)
	}
	var fromJSON tailcfg.DERPMap
	if err := json.Unmarshal(ask("json"), &fromJSON); err != nil {
		t.Fatal(err)
	}
	for name, got := range map[string]*tailcfg.DERPMap{"headscale": &fromYAML, "json": &fromJSON, "policy": parsePolicy(t, ask("policy"))} {
		if r := region(t, got); *r.Nodes[0] != *region(t, want).Nodes[0] || r.RegionID != 951 || r.RegionCode != "sha" || r.RegionName != "Shanghai" {
			t.Errorf("%s: %+v %+v, want %+v", name, r, r.Nodes[0], region(t, want).Nodes[0])
		}
	}
	if _, err := (admin.Client{Addr: n.listeners.admin.Addr().String()}).Map(t.Context(), "xml"); err == nil {
		t.Error("an unknown format was answered")
	}
}

func TestSTUNNamesTheClient(t *testing.T) {
	for _, listen := range []string{"127.0.0.1", "::1", "::"} {
		t.Run(listen, func(t *testing.T) {
			n := begin(t, testkit.Environ(t, "DERP_STUN_ADDR="+listen))
			stunPort := uint16(port(n.listeners.stun.LocalAddr()))
			targets := map[string][]string{"127.0.0.1": {"127.0.0.1"}, "::1": {"::1"}, "::": {"127.0.0.1", "127.0.0.2", "::1"}}[listen]
			for _, target := range targets {
				to := netip.AddrPortFrom(netip.MustParseAddr(target), stunPort)
				conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
				if err != nil {
					t.Fatal(err)
				}
				tx := stun.NewTxID()
				if _, err := conn.Write(stun.Request(tx)); err != nil {
					t.Fatal(err)
				}
				if err := conn.SetReadDeadline(time.Now().Add(testkit.Patience)); err != nil {
					t.Fatal(err)
				}
				buf := make([]byte, 1500)
				// A connected socket receives only from the
				// address that it has sent to.
				size, err := conn.Read(buf)
				if err != nil {
					t.Fatalf("%s: %v", target, err)
				}
				got, seen, err := stun.ParseResponse(buf[:size])
				if err != nil || got != tx {
					t.Fatalf("%s: %v", target, err)
				}
				if want := conn.LocalAddr().(*net.UDPAddr).AddrPort(); seen != want {
					t.Errorf("%s: STUN says %s, the client is %s", target, seen, want)
				}
				_ = conn.Close()
			}
		})
	}
}

// response is the part of an HTTP response that the tests check.
type response struct {
	status int
	proto  string
	header http.Header
	body   string
}

func do(t *testing.T, c *http.Client, method, target string, header http.Header) response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, target, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = header
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response{res.StatusCode, res.Proto, res.Header, string(body)}
}

func TestRoutes(t *testing.T) {
	n := begin(t, testkit.Environ(t, "DERP_PUBLIC_PORT=8443", "DERP_PUBLIC_HTTP_PORT=80"))
	roots := x509.NewCertPool()
	roots.AddCert(n.certs.Status().Leaf)
	client := &http.Client{
		Transport:     &http.Transport{TLSClientConfig: testkit.Trust(roots), DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	https, plain := "https://"+n.listeners.https.Addr().String(), "http://"+n.listeners.http.Addr().String()
	challenge := http.Header{"X-Tailscale-Challenge": {"ts_derp.example.com"}}
	for _, tt := range []struct {
		url    string
		header http.Header
		status int
		want   map[string]string // header fields of the response
		body   string
	}{
		{url: https + "/", status: 200, body: ""},
		{url: https + "/anything/else", status: 200, body: ""},
		{url: https + "/robots.txt", status: 200, body: "User-agent: *\nDisallow: /\n"},
		{url: https + "/derp/probe", status: 200, want: map[string]string{"Access-Control-Allow-Origin": "*"}},
		{url: https + "/derp/latency-check", status: 200, want: map[string]string{"Access-Control-Allow-Origin": "*"}},
		{url: https + "/derp", status: 200, body: ""},
		{url: https + "/bootstrap-dns", status: 200, want: map[string]string{"Content-Type": "application/json"}, body: "{}"},
		{url: https + "/generate_204", header: challenge, status: 204, want: map[string]string{"X-Tailscale-Response": "response ts_derp.example.com"}},
		{url: plain + "/generate_204", header: challenge, status: 204, want: map[string]string{"X-Tailscale-Response": "response ts_derp.example.com"}},
		{url: plain + "/a?b=c", status: 302, want: map[string]string{"Location": "https://127.0.0.1:8443/a?b=c"}, body: "<a href=\"https://127.0.0.1:8443/a?b=c\">Found</a>.\n\n"},
		{url: https + "/healthz", status: 200, body: ""},
		{url: https + "/debug/", status: 200, body: ""},
	} {
		res := do(t, client, http.MethodGet, tt.url, tt.header)
		if res.status != tt.status || res.body != tt.body || res.proto != "HTTP/1.1" {
			t.Errorf("%s: %s %d %q, want %d %q over HTTP/1.1", tt.url, res.proto, res.status, res.body, tt.status, tt.body)
		}
		for field, want := range tt.want {
			if got := res.header.Get(field); got != want {
				t.Errorf("%s: %s is %q, want %q", tt.url, field, got, want)
			}
		}
		// Scanners recognize relays by such pages and their headers.
		if path := strings.TrimPrefix(tt.url, https); path == "/" || path == "/derp" || path == "/anything/else" || path == "/robots.txt" {
			for field := range res.header {
				if !slices.Contains([]string{"Content-Length", "Content-Type", "Date"}, field) {
					t.Errorf("%s shows strangers %s: %s", tt.url, field, res.header.Get(field))
				}
			}
		}
	}
	if res := do(t, client, http.MethodConnect, https, nil); res.status < 400 {
		t.Errorf("CONNECT: %d, want a refusal: this is no proxy", res.status)
	}
	if !region(t, parsePolicy(t, n.printed)).Nodes[0].CanPort80 {
		t.Error("CanPort80 is false, though port 80 leads here")
	}
}

func TestStopIsQuickWithClientsConnected(t *testing.T) {
	n := begin(t, testkit.Environ(t))
	r := region(t, parsePolicy(t, n.printed))
	a, b := exchangeOver(t, r, nil)
	gone := make(chan struct{}, 2)
	for _, c := range []*derphttp.Client{a, b} {
		go func() {
			for {
				if _, err := c.Recv(); err != nil {
					gone <- struct{}{}
					return
				}
			}
		}()
	}
	begun := time.Now()
	n.stop()
	t.Logf("stopped in %s", time.Since(begun))
	for range 2 {
		testkit.Receive(t, "a client is disconnected", gone)
	}
	if n.stun.Open() {
		t.Error("STUN is open after the stop")
	}
	if report := n.health.Report(t.Context()); report.Ready || report.Cause != "the relay is stopping" {
		t.Errorf("health after the stop: %s", report)
	}
}

// TestTasks compares what runs under a configuration with what runs by default.
func TestTasks(t *testing.T) {
	names := func(env ...string) []string {
		var list []string
		for _, task := range begin(t, testkit.Environ(t, env...)).tasks() {
			list = append(list, task.name)
		}
		slices.Sort(list)
		return list
	}
	byDefault := names()
	for _, want := range []string{"https", "http", "admin", "stun", "certificates", "self-check", "stop"} {
		if !slices.Contains(byDefault, want) {
			t.Errorf("by default %v run, want %s among them", byDefault, want)
		}
	}
	for name, tt := range map[string]struct {
		env         []string
		more, fewer []string
	}{
		"no STUN":               {env: []string{"DERP_STUN=false"}, fewer: []string{"stun"}},
		"no port 80":            {env: []string{"DERP_HTTP_PORT=-1"}, fewer: []string{"http"}},
		"TLS ends in front":     {env: []string{"DERP_CERT_MODE=off", "DERP_HTTP_PORT=-1"}, fewer: []string{"http", "certificates"}},
		"a health listener":     {env: []string{"DERP_HEALTH_ADDR=127.0.0.1:0"}, more: []string{"health"}},
		"a source of admission": {env: []string{"DERP_ALLOW_KEYS=" + key.NewNode().Public().String()}, more: []string{"clients"}},
		"open on order":         {env: []string{"DERP_VERIFY_CLIENTS=false"}, fewer: []string{"admission"}},
		"a mesh":                {env: []string{"DERP_MESH_WITH=127.0.0.1:1", "DERP_MESH_KEY=" + meshSecret}, more: []string{"mesh"}},
	} {
		want := slices.DeleteFunc(slices.Concat(byDefault, tt.more), func(task string) bool { return slices.Contains(tt.fewer, task) })
		slices.Sort(want)
		if got := names(tt.env...); !slices.Equal(got, want) {
			t.Errorf("%s: %v run, want %v", name, got, want)
		}
	}
}
