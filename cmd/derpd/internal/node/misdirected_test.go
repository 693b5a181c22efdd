package node

import (
	"bytes"
	"context"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"
	"github.com/rs/zerolog"
	"tailscale.com/derp/derphttp"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/healthz"
	"derpd/internal/testkit"
)

// TestMisdirectedClients runs real clients by the printed map, with something in
// front of the relay that breaks them. Health, log and metric have the cause, and
// the log has no address of a client.
func TestMisdirectedClients(t *testing.T) {
	lines := func(pattern string) func(string) string {
		return func(recipe string) string {
			return regexp.MustCompile(`(?m)^\s*(`+pattern+`) .*\n`).ReplaceAllString(recipe, "")
		}
	}
	var rows []*misdirectedRow
	for name, tt := range map[string]struct {
		proxy *httpProxy                 // nil: the client dials the relay
		edit  func(recipe string) string // of the proxy
		to    func(*Node) net.Addr       // where the proxy leads; nil: https
		env   []string                   // after the environment of ends-tls
		// header is a PROXY header in front of the client's first bytes.
		header bool
		reason string
		fix    string
	}{
		"nginx without the lines for Upgrade": {
			proxy: new(nginxProxy()), edit: lines("proxy_set_header (?:Upgrade|Connection)"),
			reason: "no-upgrade", fix: "Websockets Support",
		},
		"nginx with nothing but proxy_pass": {
			proxy: new(nginxProxy()), edit: lines(`proxy_set_header|proxy_http_version`),
			env: []string{"DERP_TRUSTED_PROXIES="}, reason: "no-upgrade", fix: "proxy_http_version 1.1",
		},
		"Caddy that removes Upgrade": {
			proxy: new(caddyProxy()), edit: func(recipe string) string {
				return strings.Replace(recipe, "stream_close_delay 1h", "header_up -Upgrade\n\t\theader_up -Connection", 1)
			},
			reason: "no-upgrade", fix: "Websockets Support",
		},
		"nginx that sends HTTP to TLS": {
			proxy: new(nginxProxy()), env: []string{"DERP_CERT_MODE=pinned", "DERP_TRUSTED_PROXIES="},
			reason: "plain-on-tls-port", fix: "set DERP_CERT_MODE=off",
		},
		"nginx that sends clients to port 80": {
			proxy: new(nginxProxy()), to: func(n *Node) net.Addr { return n.listeners.http.Addr() },
			env:    []string{"DERP_CERT_MODE=pinned", "DERP_HTTP_PORT=0", "DERP_TRUSTED_PROXIES="},
			reason: "derp-on-plain-port", fix: "let the proxy send them to DERP_ADDR",
		},
		"no proxy that ends TLS": {reason: "tls-on-plain-port", fix: "remove DERP_CERT_MODE=off"},
		"PROXY headers that are not expected": {
			header: true, env: []string{"DERP_TRUSTED_PROXIES=", "DERP_CERT_MODE=pinned"},
			reason: "unexpected-proxy-header", fix: "set DERP_PROXY_PROTOCOL=true",
		},
		"PROXY headers of a proxy that is not trusted": {
			header: true, env: []string{"DERP_TRUSTED_PROXIES=10.0.0.1", "DERP_PROXY_PROTOCOL=true", "DERP_CERT_MODE=pinned"},
			reason: "untrusted-proxy-header", fix: "add the address",
		},
	} {
		if tt.proxy != nil && tt.proxy.path == "" {
			t.Logf("%s: no such proxy on this machine", name)
			continue
		}
		port := strconv.Itoa(testkit.FreePort(t))
		row := &misdirectedRow{name: name, reason: tt.reason, fix: tt.fix}
		rows = append(rows, row)
		n := begin(t, endsTLS(t, port, tt.env...), func(n *Node) { n.log = zerolog.New(&row.log).Level(zerolog.InfoLevel) })
		row.n = n
		r := region(t, parsePolicy(t, n.printed))
		trust := func(*derphttp.Client) {}
		if tt.proxy != nil {
			to := n.listeners.https.Addr()
			if tt.to != nil {
				to = tt.to(n.Node)
			}
			roots := tt.proxy.start(t, port, to.String(), tt.edit)
			trust = func(c *derphttp.Client) { c.TLSConfig = testkit.Trust(roots) }
			r.Nodes[0].CertName = "" // the proxy has the certificate
		}
		row.connect = func() error { return connectOnce(t, n, r, tt.proxy == nil, tt.header, trust) }
	}
	// The clients of all rows retry at the same time.
	testkit.Until(t, "health has the cause of every row", func() bool {
		all := true
		for _, row := range rows {
			if err := row.connect(); err == nil {
				t.Fatalf("%s: a client connects", row.name)
			}
			result := row.n.checkProxies(t.Context())
			all = all && result.Level == healthz.Warn && strings.Contains(result.Detail, row.fix) && strings.Contains(result.Detail, row.reason)
		}
		return all
	})
	for _, row := range rows {
		t.Run(row.name, row.check)
	}
}

// misdirectedRow is a relay whose clients cannot connect.
type misdirectedRow struct {
	name, reason, fix string
	n                 *testNode
	log               testkit.Buffer
	connect           func() error
}

// check checks what the operator sees, after health has the cause.
func (row *misdirectedRow) check(t *testing.T) {
	if report := row.n.health.Report(t.Context()); !report.Ready {
		t.Errorf("strangers could make the relay not ready: %v", report)
	}
	text := row.log.String()
	if got := strings.Count(text, `"reason":"`+row.reason+`"`); got != 1 || !strings.Contains(strings.ReplaceAll(text, `\"`, `"`), row.fix) {
		t.Errorf("%d log lines with %s, want one with %q:\n%s", got, row.reason, row.fix, text)
	}
	for line := range strings.Lines(text) {
		if strings.Contains(line, `"reason"`) && strings.Contains(line, "127.0.0.1") {
			t.Errorf("an address in the log: %s", line)
		}
	}
	metrics := do(t, http.DefaultClient, http.MethodGet, "http://"+row.n.listeners.admin.Addr().String()+"/metrics", nil).body
	if count := regexp.MustCompile(`(?m)^derpd_misdirected_total\{reason="` + row.reason + `"\} (\d+)$`).FindStringSubmatch(metrics); count == nil || count[1] == "0" {
		t.Errorf("metric of %s: %v", row.reason, count)
	}
}

// connectOnce connects a client by the map once. A direct client dials the relay
// itself in place of the public port.
func connectOnce(t *testing.T, n *testNode, r *tailcfg.DERPRegion, direct, header bool, trust func(*derphttp.Client)) error {
	t.Helper()
	node := *r.Nodes[0]
	if direct && !header {
		_, port, err := net.SplitHostPort(n.listeners.https.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if node.DERPPort, err = strconv.Atoi(port); err != nil {
			t.Fatal(err)
		}
	}
	c := testkit.RegionClient(t, &tailcfg.DERPRegion{RegionID: r.RegionID, RegionCode: r.RegionCode, Nodes: []*tailcfg.DERPNode{&node}}, key.NewNode())
	if header {
		c = testkit.URLClient(t, "https://"+proxiedName+"/derp", key.NewNode())
		c.SetURLDialer(func(ctx context.Context, network, _ string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, n.listeners.https.Addr().String())
			if err != nil {
				return nil, err
			}
			client := &net.TCPAddr{IP: net.IP{198, 51, 100, 1}, Port: 4000}
			_, err = proxyproto.HeaderProxyFromAddrs(2, client, conn.RemoteAddr()).WriteTo(conn)
			return conn, err
		})
	}
	trust(c)
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return c.Connect(ctx)
}

// Scanners do not change health: they send requests and handshakes of every kind
// to a relay behind a proxy that is set up well.
func TestScannersDoNotChangeHealth(t *testing.T) {
	proxy := nginxProxy()
	if proxy.path == "" {
		t.Skip("no nginx on this machine")
	}
	port := strconv.Itoa(testkit.FreePort(t))
	n := begin(t, endsTLS(t, port))
	roots := proxy.start(t, port, n.listeners.https.Addr().String(), nil)
	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig: testkit.Trust(roots), DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, "127.0.0.1:"+port)
		},
	}}
	for _, header := range []http.Header{
		{"User-Agent": {"curl/8.0"}, "Accept": {"*/*"}},
		{"User-Agent": {"Mozilla/5.0 zgrab/0.x"}, "Accept": {"*/*"}},
		{"User-Agent": {"python-requests/2"}, "X-Forwarded-For": {"198.51.100.1"}},
		{}, // once with Go's own User-Agent
	} {
		for _, path := range []string{"/derp", "/", "/derp/probe"} {
			if got := do(t, client, http.MethodGet, "https://"+proxiedName+path, header); got.status != http.StatusOK {
				t.Errorf("%s: %d", path, got.status)
			}
		}
	}
	for _, first := range [][]byte{[]byte("\x16\x03\x01\x00\x05\x01\x00\x00\x01\x03"), []byte("GET /derp HTTP/1.0\r\n\r\n"), bytes.Repeat([]byte{0}, 64), []byte("SSH-2.0-a\r\n")} {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", n.listeners.https.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write(first)
		_ = conn.(*net.TCPConn).CloseWrite()
		_ = conn.SetReadDeadline(time.Now().Add(testkit.Patience))
		_, _ = conn.Read(make([]byte, 1))
		_ = conn.Close()
	}
	var counted uint64
	for _, s := range n.relay.Misdirected() {
		counted += s.Count
		if s.Now {
			t.Errorf("%s is reported", s.Misdirection)
		}
	}
	if counted < 5 {
		t.Errorf("%d arrivals are counted, want those of all scanners", counted)
	}
	if got := n.checkProxies(t.Context()); got.Level != healthz.OK {
		t.Error(got.Detail)
	}
}
