package relay

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp/derphttp"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// The meta certificate, and so the node key, goes to clients of this relay alone.
func TestMetaCertificate(t *testing.T) {
	const name, address = "derp.example.com", "127.0.0.1"
	cert := testkit.SelfSigned(t, name, address, "*.wild.example.com")
	for what, tt := range map[string]struct {
		names   []string
		sni     string
		version uint16
		alpn    []string
		want    bool
	}{
		"our name":                        {names: []string{name}, sni: name, want: true},
		"our name in capitals":            {names: []string{name}, sni: "DERP.Example.com", want: true},
		"our second name":                 {names: []string{name, "relay.example.net"}, sni: "relay.example.net", want: true},
		"a name of the certificate":       {names: []string{"relay.example.net"}, sni: name, want: true},
		"a wildcard of the certificate":   {names: []string{name}, sni: "a.wild.example.com", want: true},
		"no name, ours is an address":     {names: []string{address}, want: true},
		"no name, none of ours is known":  {want: true},
		"no name, an address is ours too": {names: []string{name, address}, want: true},
		"no name, ours is a name":         {names: []string{name}},
		"another name":                    {names: []string{name}, sni: "www.example.org"},
		"another name, ours an address":   {names: []string{address}, sni: "www.example.org"},
		"the domain above":                {names: []string{name}, sni: "example.com"},
		"our name before TLS 1.3":         {names: []string{name}, sni: name, version: tls.VersionTLS12},
		"no name before TLS 1.3":          {names: []string{address}, version: tls.VersionTLS12},
		"our name in a challenge":         {names: []string{name}, sni: name, alpn: []string{acmeTLS1}},
	} {
		t.Run(what, func(t *testing.T) {
			ln := listen(t)
			start(t, Config{
				Names: tt.names, Log: zerolog.Nop(),
				GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil },
			}, ln)
			chain, _ := handshake(t, ln.Addr().String(), tt.sni, tt.version, tt.alpn)
			if got := slices.ContainsFunc(chain, func(cn string) bool { return strings.HasPrefix(cn, "derpkey") }); got != tt.want {
				t.Errorf("the chain is %q; meta certificate %v, want %v", chain, got, tt.want)
			}
		})
	}
}

// Clients keep the fast start by each map that leads to this relay: by name, by
// address, by an address beside the name, and with the hash of the certificate.
func TestFastStartIsKept(t *testing.T) {
	cert := testkit.SelfSigned(t, "derp.example.com", "127.0.0.1")
	for what, tt := range map[string]struct {
		names []string
		node  tailcfg.DERPNode
	}{
		"a name":                   {[]string{"derp.example.com"}, tailcfg.DERPNode{HostName: "derp.example.com"}},
		"a name with a hash":       {[]string{"derp.example.com"}, tailcfg.DERPNode{HostName: "derp.example.com", CertName: "sha256-raw:" + testkit.Hash(cert.Leaf)}},
		"an address":               {[]string{"127.0.0.1"}, tailcfg.DERPNode{HostName: "127.0.0.1"}},
		"an address with a hash":   {nil, tailcfg.DERPNode{HostName: "127.0.0.1", CertName: "sha256-raw:" + testkit.Hash(cert.Leaf)}},
		"an address beside a name": {[]string{"derp.example.com", "127.0.0.1"}, tailcfg.DERPNode{HostName: "127.0.0.1"}},
	} {
		t.Run(what, func(t *testing.T) {
			ln := listen(t)
			start(t, Config{
				Names: tt.names, Log: zerolog.Nop(),
				GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil },
			}, ln)
			node := tt.node
			node.Name, node.RegionID, node.IPv4, node.IPv6 = "1a", 1, "127.0.0.1", "none"
			node.DERPPort = ln.Addr().(*net.TCPAddr).Port
			c := testkit.RegionClient(t, &tailcfg.DERPRegion{RegionID: 1, RegionCode: "t", Nodes: []*tailcfg.DERPNode{&node}}, key.NewNode())
			c.TLSConfig = testkit.Trust(testkit.Pool(cert))
			testkit.MustAdmit(t, c)
			if !fastStarted(c) {
				t.Error("the client gets no meta certificate")
			}
		})
	}
}

// fastStarted reports whether a connected client got the meta certificate.
func fastStarted(c *derphttp.Client) bool {
	state, ok := c.TLSConnectionState()
	return ok && len(state.PeerCertificates) == 2 && strings.HasPrefix(state.PeerCertificates[1].Subject.CommonName, "derpkey")
}

// handshake returns the common names of the server's certificates, and the ALPN
// protocol or the error.
func handshake(t *testing.T, addr, sni string, version uint16, alpn []string) (chain []string, protocol string) {
	t.Helper()
	conn := scan(t, addr)
	// A scanner verifies nothing.
	c := tls.Client(conn, &tls.Config{ServerName: sni, MaxVersion: version, NextProtos: alpn, InsecureSkipVerify: true, MinVersion: tls.VersionTLS12})
	if err := c.HandshakeContext(t.Context()); err != nil {
		return nil, err.Error()
	}
	for _, cert := range c.ConnectionState().PeerCertificates {
		chain = append(chain, cert.Subject.CommonName)
	}
	return chain, c.ConnectionState().NegotiatedProtocol
}

// scan connects without TLS. The connection ends with the test.
func scan(t *testing.T, addr string) net.Conn {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(testkit.Patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// seen is what a scanner sees of one probe: a value for each property.
type seen map[string]string

// request sends bytes over TLS, or without TLS, and returns what is seen of the
// response. Values that differ between any two servers are only "set".
func request(t *testing.T, addr, text string, secure bool) seen {
	t.Helper()
	conn := scan(t, addr)
	if secure {
		conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12})
	}
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	method, _, _ := strings.Cut(text, " ")
	response, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		return seen{"response": "none"}
	}
	body, _ := io.ReadAll(response.Body)
	_ = response.Body.Close()
	s := seen{"status": fmt.Sprintf("%s %d", response.Proto, response.StatusCode), "body": string(body)}
	for field := range response.Header {
		s[field] = response.Header.Get(field)
		if slices.Contains([]string{"Date", "Server", "Last-Modified", "Etag", "Content-Length", "Location"}, field) {
			s[field] = "set"
		}
	}
	return s
}

// differences returns the properties in which two servers differ.
func differences(a, b seen) []string {
	var list []string
	for property := range maps.Keys(merged(a, b)) {
		if a[property] != b[property] {
			list = append(list, property)
		}
	}
	slices.Sort(list)
	return list
}

func merged(a, b seen) seen {
	both := maps.Clone(a)
	maps.Copy(both, b)
	return both
}

// nginxPage runs nginx with one page for every path, and the certificate.
func nginxPage(t *testing.T, cert *tls.Certificate) (addr string) {
	t.Helper()
	path, err := exec.LookPath("nginx")
	if debian := "/usr/sbin/nginx"; err != nil {
		if _, err := os.Stat(debian); errors.Is(err, os.ErrNotExist) {
			t.Skip("no nginx on this machine")
		}
		path = debian
	}
	dir := t.TempDir()
	addr = fmt.Sprintf("127.0.0.1:%d", testkit.FreePort(t))
	testkit.WritePair(t, filepath.Join(dir, "site.crt"), filepath.Join(dir, "site.key"), cert)
	testkit.File("index.html", page)(t, dir)
	testkit.File("nginx.conf", strings.ReplaceAll(`daemon off;
pid DIR/nginx.pid;
events {}
http {
	access_log off;
	client_body_temp_path DIR/body;
	proxy_temp_path DIR/proxy;
	fastcgi_temp_path DIR/fastcgi;
	uwsgi_temp_path DIR/uwsgi;
	scgi_temp_path DIR/scgi;
	types { text/html html; }
	charset utf-8;
	server {
		listen ADDR ssl;
		ssl_certificate DIR/site.crt;
		ssl_certificate_key DIR/site.key;
		ssl_protocols TLSv1.2 TLSv1.3;
		root DIR;
		location / { try_files /index.html =404; }
	}
}
`, "DIR", dir))(t, dir)
	conf := filepath.Join(dir, "nginx.conf")
	text, err := os.ReadFile(conf)
	if err != nil {
		t.Fatal(err)
	}
	testkit.File("nginx.conf", strings.ReplaceAll(string(text), "ADDR", addr))(t, dir)
	if os.Geteuid() == 0 { // nginx's workers then are another user
		if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755), os.Chmod(filepath.Join(dir, "index.html"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(context.Background(), path, "-e", "stderr", "-c", conf)
	var out testkit.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(out.String())
		}
	})
	testkit.Wait(t, "nginx", func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
		if err != nil {
			return err
		}
		return conn.Close()
	})
	return addr
}

// TestScannerSees compares what a scanner sees of this relay with a page of nginx.
// The table has every difference that is left, and why.
func TestScannerSees(t *testing.T) {
	// A page of nginx is a file. nginx also names itself.
	const file = "Accept-Ranges Connection Etag Last-Modified Server"
	// nginx has its own error pages. Package http writes some of them without
	// headers.
	const refused, broken = "Allow Connection Content-Type Server X-Content-Type-Options body", "Content-Length Content-Type Date Server body"
	cert := testkit.SelfSigned(t, "derp.example.com")
	home, err := Home("page")
	if err != nil {
		t.Fatal(err)
	}
	ln := listen(t)
	start(t, Config{
		Names: []string{"derp.example.com"}, Home: home, Log: zerolog.Nop(),
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil },
	}, ln)
	ours, nginx := ln.Addr().String(), nginxPage(t, cert)

	for _, tt := range []struct {
		sni     string
		version uint16
		alpn    []string
		differs string // why; empty: they do not differ
	}{
		{},
		{sni: "www.example.org"},
		{version: tls.VersionTLS12},
		{sni: "www.example.org", version: tls.VersionTLS12},
		{sni: "derp.example.com", version: tls.VersionTLS12},
		{alpn: []string{"h2", "http/1.1"}},
		{alpn: []string{"http/1.1"}},
		{alpn: []string{"h2"}},
		{sni: "derp.example.com", differs: "clients need the meta certificate for the fast start"},
		{alpn: []string{acmeTLS1}, differs: "an authority validates the name by TLS-ALPN-01"},
	} {
		chain, protocol := handshake(t, ours, tt.sni, tt.version, tt.alpn)
		wantChain, wantProtocol := handshake(t, nginx, tt.sni, tt.version, tt.alpn)
		if differ := !slices.Equal(chain, wantChain) || protocol != wantProtocol; differ != (tt.differs != "") {
			t.Errorf("%+v: %q %q, and nginx %q %q", tt, chain, protocol, wantChain, wantProtocol)
		}
	}

	get := func(path string) string { return "GET " + path + " HTTP/1.1\r\nHost: www.example.org\r\n\r\n" }
	for _, tt := range []struct {
		send    string
		plain   bool   // without TLS
		differs string // properties; the comment has the reason
	}{
		// The relay serves no file.
		{send: get("/"), differs: file},
		{send: get("/unknown/path"), differs: file},
		{send: get("/derp"), differs: file},
		{send: "HEAD /derp HTTP/1.1\r\nHost: a\r\n\r\n", differs: file},
		{send: get("/derp/"), differs: file},
		{send: get("/derp/mesh"), differs: file},
		{send: "GET /derp HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", differs: file},
		{send: get("/metrics"), differs: file},
		// Package http answers in the version of the request, and the relay always says
		// that it closes.
		{send: "GET / HTTP/1.0\r\n\r\n", differs: "Accept-Ranges Connection Etag Last-Modified Server status"},
		// Search engines must not list the relay.
		{send: get("/robots.txt"), differs: "Accept-Ranges Connection Content-Type Etag Last-Modified Server body"},
		// Clients look for captive portals.
		{send: get("/generate_204"), differs: "Accept-Ranges Cache-Control Connection Content-Length Content-Type Etag Last-Modified Server body status"},
		// Clients without UDP measure the latency. Clients in a browser need
		// Access-Control-Allow-Origin.
		{send: get("/derp/probe"), differs: "Accept-Ranges Access-Control-Allow-Origin Connection Content-Type Etag Last-Modified Server body"},
		{send: get("/derp/latency-check"), differs: "Accept-Ranges Access-Control-Allow-Origin Connection Content-Type Etag Last-Modified Server body"},
		// Clients without DNS request addresses.
		{send: get("/bootstrap-dns?q=a"), differs: "Accept-Ranges Connection Content-Security-Policy Content-Type Etag Last-Modified Server X-Content-Type-Options body"},
		// Every server has its own error pages.
		{send: "POST /derp HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", differs: refused},
		{send: "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", differs: refused},
		{send: "CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", differs: "Content-Type Server X-Content-Type-Options body status"},
		{send: "GET / HTTP/1.1\r\n\r\n", differs: broken},
		{send: "GET / HTTP/9.9\r\nHost: a\r\n\r\n", differs: broken},
		{send: "garbage\r\n\r\n", differs: broken},
		{send: get("/"), plain: true, differs: broken + " status"},
	} {
		got, want := request(t, ours, tt.send, !tt.plain), request(t, nginx, tt.send, !tt.plain)
		if differ := strings.Join(differences(got, want), " "); differ != tt.differs {
			t.Errorf("%q: %s differ, want %s\n%v\n%v", tt.send, differ, tt.differs, got, want)
		}
	}

	// A request to /derp without an upgrade has exactly the answer of any other.
	for _, method := range []string{"GET", "HEAD", "POST", "OPTIONS", "PROPFIND"} {
		text := method + " PATH HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
		derp, other := request(t, ours, strings.Replace(text, "PATH", "/derp", 1), true), request(t, ours, strings.Replace(text, "PATH", "/drep", 1), true)
		if differ := differences(derp, other); len(differ) > 0 {
			t.Errorf("%s /derp differs from an unknown page in %q", method, differ)
		}
	}
}
