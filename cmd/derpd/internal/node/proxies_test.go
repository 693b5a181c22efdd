package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"
	"tailscale.com/derp/derphttp"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/healthz"
	"derpd/internal/testkit"
	"derpd/internal/testkit/acmetest"
)

// proxiedName is the name of the relay in docker/proxies.
const proxiedName = "derp.example.com"

// TestBehindProxies runs the recipes of docker/proxies, with a proxy on the
// public port. Through the proxy the relay obtains its certificate and two
// clients exchange packets; another name leads to a website.
func TestBehindProxies(t *testing.T) {
	for name, tt := range map[string]struct {
		program, recipe string

		// change replaces text of the recipe, as a comment in the
		// recipe says.
		change [2]string

		// sees is the address that the relay sees for a client at
		// 127.0.0.9.
		sees string

		// around makes a complete configuration of the recipe. The
		// program may write to dir.
		around func(recipe, dir string) string

		check, run []string // arguments; $F is the path of the configuration
	}{
		"nginx": {
			"nginx", "nginx.conf",
			[2]string{},
			"127.0.0.1", aroundStream,
			[]string{"-t", "-e", "stderr", "-c", "$F"},
			[]string{"-e", "stderr", "-c", "$F"},
		},
		"nginx with addresses": {
			"nginx", "nginx.conf",
			[2]string{"# proxy_protocol on;", "proxy_protocol on;"},
			"127.0.0.9", aroundStream,
			[]string{"-t", "-e", "stderr", "-c", "$F"},
			[]string{"-e", "stderr", "-c", "$F"},
		},
		"haproxy": {
			"haproxy", "haproxy.cfg",
			[2]string{},
			"127.0.0.9",
			func(recipe, _ string) string { return recipe },
			[]string{"-c", "-f", "$F"},
			[]string{"-db", "-f", "$F"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := program(t, tt.program, "/usr/sbin/"+tt.program)
			number := testkit.FreePort(t)
			proxyPort := strconv.Itoa(number)
			website := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				_, _ = w.Write([]byte("website"))
			}))
			// It takes the header, as nginx's own websites do.
			website.Listener = &proxyproto.Listener{
				Listener:   website.Listener,
				ConnPolicy: func(proxyproto.ConnPolicyOptions) (proxyproto.Policy, error) { return proxyproto.USE, nil },
			}
			website.StartTLS()
			t.Cleanup(website.Close)
			sources := newSources(t)

			authority := acmetest.Start(t)
			env := append(testkit.Environ(t), settings(t, "docker", "proxies", "derpd.env")...)
			env = append(env, "DERP_ADDR=127.0.0.1:0", "DERP_PUBLIC_PORT="+proxyPort,
				"DERP_ACME_CA="+authority.Directory, "DERP_ACME_CA_ROOTS="+authority.RootsFile,
				"DERP_VERIFY_CLIENT_URL="+sources.url)
			n := begin(t, env, func(n *Node) {
				// Only the addresses of the recipe change.
				recipe := strings.NewReplacer(
					"127.0.0.1:8443", n.listeners.https.Addr().String(),
					"127.0.0.1:4430", website.Listener.Addr().String(),
					"listen 443", "listen 127.0.0.1:"+proxyPort, "listen [::]:443", "listen [::1]:"+proxyPort,
					"bind :443", "bind 127.0.0.1:"+proxyPort, "bind :::443", "bind ::1:"+proxyPort,
				).Replace(contents(t, "docker", "proxies", tt.recipe))
				if before := recipe; tt.change[0] != "" {
					if recipe = strings.Replace(recipe, tt.change[0], tt.change[1], 1); recipe == before {
						t.Fatalf("%s says nothing of %s", tt.recipe, tt.change[0])
					}
				}
				dir := t.TempDir()
				conf := filepath.Join(dir, tt.recipe)
				if err := os.WriteFile(conf, []byte(tt.around(recipe, dir)), 0o600); err != nil {
					t.Fatal(err)
				}
				arguments := func(list []string) []string {
					return strings.Split(strings.ReplaceAll(strings.Join(list, " "), "$F", conf), " ")
				}
				output(t, dir, nil, path, arguments(tt.check)...)
				background(t, dir, path, arguments(tt.run)...)
				awaitListener(t, "127.0.0.1:"+proxyPort)
				authority.Validate(t, 0, number)
			})

			r := region(t, parsePolicy(t, n.printed))
			if r.Nodes[0].HostName != proxiedName || fmt.Sprint(r.Nodes[0].DERPPort) != proxyPort {
				t.Fatalf("node %+v, want %s and the proxy's port %s", r.Nodes[0], proxiedName, proxyPort)
			}
			roots := authority.Roots()
			exchangeOver(t, r, func(c *derphttp.Client) { c.TLSConfig = testkit.Trust(roots) })
			// One client sends X-Forwarded-For, which the relay
			// must ignore.
			for _, claim := range []string{"", "198.51.100.1"} {
				c := dialWebSocketFrom(t, "127.0.0.9", "127.0.0.1:"+proxyPort, testkit.Trust(roots), claim)
				sources.want(t, n, c.SelfPublicKey(), tt.sees)
			}
			if got := throughProxy(t, proxyPort, website); got != "website" {
				t.Errorf("another name leads to %q, want the website", got)
			}
			// STUN does not pass the proxy, and answers on all
			// addresses of both families.
			for _, host := range []string{"127.0.0.2", "::1"} {
				askedBeside(t, net.JoinHostPort(host, fmt.Sprint(port(n.listeners.stun.LocalAddr()))))
			}
		})
	}
}

// aroundStream makes a complete configuration of nginx's stream recipe.
func aroundStream(recipe, dir string) string {
	head := "daemon off;\npid " + dir + "/nginx.pid;\nevents {}\n"
	// The stream module is a file of its own in Debian, and built in
	// elsewhere.
	if module := "/usr/lib/nginx/modules/ngx_stream_module.so"; exists(module) {
		head = "load_module " + module + ";\n" + head
	}
	return head + recipe
}

// sources is an admission URL that admits every node, and records the node's
// address.
type sources struct {
	url string

	mu   sync.Mutex
	seen map[key.NodePublic]netip.Addr // guarded by mu
}

func newSources(t *testing.T) *sources {
	t.Helper()
	s := &sources{seen: make(map[key.NodePublic]netip.Addr)}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var question tailcfg.DERPAdmitClientRequest
		if err := json.NewDecoder(r.Body).Decode(&question); err != nil {
			t.Error(err)
		}
		s.mu.Lock()
		s.seen[question.NodePublic] = question.Source
		s.mu.Unlock()
		_ = json.NewEncoder(w).Encode(tailcfg.DERPAdmitClientResponse{Allow: true})
	}))
	t.Cleanup(server.Close)
	s.url = server.URL
	return s
}

// want checks the address of a connected node, in the request to the admission
// URL and in the relay's list of clients.
func (s *sources) want(t *testing.T, n *testNode, node key.NodePublic, want string) {
	t.Helper()
	s.mu.Lock()
	asked := s.seen[node]
	s.mu.Unlock()
	if asked.String() != want {
		t.Errorf("the admission URL is asked about a client at %s, want %s", asked, want)
	}
	testkit.Until(t, "the client is listed at "+want, func() bool {
		listed, ok := n.relay.Clients()[node]
		return ok && listed.Unmap().String() == want
	})
}

// TestStrangersBesideTheProxy connects to a relay with the PROXY protocol from
// other addresses than the proxy's. The relay uses their own addresses, refuses
// their PROXY headers, and ignores X-Forwarded-For of everybody.
func TestStrangersBesideTheProxy(t *testing.T) {
	sources := newSources(t)
	n := begin(t, testkit.Environ(t, "DERP_CERT_MODE=off", "DERP_DOMAIN="+proxiedName, "DERP_HTTP_PORT=0",
		"DERP_TRUSTED_PROXIES=127.0.0.9", "DERP_PROXY_PROTOCOL=true", "DERP_VERIFY_CLIENT_URL="+sources.url))
	addr := n.listeners.https.Addr().String()
	for _, from := range []string{"127.0.0.8", "127.0.0.9"} {
		c := dialWebSocketFrom(t, from, addr, nil, "198.51.100.1")
		sources.want(t, n, c.SelfPublicKey(), from)
	}
	// Both listeners take a PROXY header from the proxy, and refuse one
	// from elsewhere.
	for _, target := range []string{addr, n.listeners.http.Addr().String()} {
		for from, want := range map[string]string{"127.0.0.8": "", "127.0.0.9": "HTTP/1.1 204 No Content"} {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
			conn, err := d.DialContext(t.Context(), "tcp", target)
			if err != nil {
				t.Fatal(err)
			}
			if err := conn.SetDeadline(time.Now().Add(testkit.Patience)); err != nil {
				t.Fatal(err)
			}
			_, _ = io.WriteString(conn, "PROXY TCP4 198.51.100.1 203.0.113.1 4000 443\r\nGET /generate_204 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
			got, _ := io.ReadAll(conn)
			_ = conn.Close()
			if line, _, _ := strings.Cut(string(got), "\r\n"); line != want {
				t.Errorf("%s from %s: %q, want %q", target, from, line, want)
			}
		}
	}
	if report := n.health.Report(t.Context()); !report.Ready {
		t.Error(report)
	}
}

// readFile returns the content of a file.
func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// settings reads the NAME=value lines of a file of this repository.
func settings(t *testing.T, parts ...string) []string {
	t.Helper()
	var env []string
	for line := range strings.Lines(contents(t, parts...)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			env = append(env, line)
		}
	}
	return env
}

// exists reports whether a file exists.
func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// background runs a program until the test ends.
func background(t *testing.T, dir, path string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(context.Background(), path, args...)
	cmd.Dir = dir
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("output of %s:\n%s", path, out.String())
		}
	})
}

// awaitListener waits until something accepts connections on addr.
func awaitListener(t *testing.T, addr string) {
	t.Helper()
	testkit.Wait(t, "a listener on "+addr, func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// throughProxy returns the page that a browser gets for another name.
func throughProxy(t *testing.T, proxyPort string, website *httptest.Server) string {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(website.Certificate())
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		// httptest's certificate covers example.com.
		TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "example.com", MinVersion: tls.VersionTLS12},
	}}
	return do(t, client, http.MethodGet, "https://127.0.0.1:"+proxyPort+"/", nil).body
}

// askedBeside sends a STUN request to addr. The response must have this
// client's address.
func askedBeside(t *testing.T, addr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "udp", addr)
	if err != nil {
		t.Skipf("no way to %s here: %v", addr, err)
	}
	own := conn.LocalAddr().(*net.UDPAddr).AddrPort()
	if seen, _, err := healthz.AskSTUN(ctx, conn); err != nil || seen != own {
		t.Errorf("STUN at %s says %s, %v; the client is %s", addr, seen, err, own)
	}
}
