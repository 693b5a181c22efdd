package node

import (
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"tailscale.com/derp/derphttp"
	"tailscale.com/types/key"

	"derpd/healthz"
	"derpd/internal/testkit"
)

// httpProxy is a proxy that ends TLS, with its recipe in docker/proxies/ends-tls.
type httpProxy struct {
	recipe string

	path string // of the program; empty if this machine has none

	// around makes a complete configuration of the recipe. The proxy's
	// certificate is site.crt and site.key in dir, and the program may write to
	// dir.
	around func(recipe, dir, port string) string

	run []string // arguments; $F is the path of the configuration
}

func nginxProxy() httpProxy {
	path, err := exec.LookPath("nginx")
	if debian := "/usr/sbin/nginx"; err != nil && exists(debian) {
		path = debian
	}
	return httpProxy{
		recipe: "nginx.conf",
		path:   path,
		around: func(recipe, dir, port string) string {
			recipe = strings.NewReplacer(
				"listen 443", "listen 127.0.0.1:"+port, "listen [::]:443", "listen [::1]:"+port,
				"/etc/nginx/derp.example.com", dir+"/site",
			).Replace(recipe)
			return "daemon off;\npid " + dir + "/nginx.pid;\nevents {}\nhttp {\naccess_log off;\n" +
				"client_body_temp_path " + dir + "/body;\nproxy_temp_path " + dir + "/proxy;\nfastcgi_temp_path " + dir + "/fastcgi;\n" +
				"uwsgi_temp_path " + dir + "/uwsgi;\nscgi_temp_path " + dir + "/scgi;\n" + recipe + "}\n"
		},
		run: []string{"-e", "stderr", "-c", "$F"},
	}
}

// caddyProxy is the proxy that DERPD_CADDY names. `make test` names it also when it is
// not built.
func caddyProxy() httpProxy {
	path := os.Getenv("DERPD_CADDY")
	if !exists(path) {
		path = ""
	}
	return httpProxy{
		recipe: "Caddyfile",
		path:   path,
		around: func(recipe, dir, port string) string {
			return "{\n\tadmin off\n\tpersist_config off\n\tauto_https disable_redirects\n\tstorage file_system " + dir + "\n" +
				"\tservers {\n\t\tprotocols h1 h2\n\t}\n}\n" +
				strings.Replace(recipe, proxiedName+" {", proxiedName+":"+port+" {\n\tbind 127.0.0.1\n\ttls "+dir+"/site.crt "+dir+"/site.key", 1)
		},
		run: []string{"run", "--adapter", "caddyfile", "--config", "$F"},
	}
}

// start runs the proxy on a port in front of a relay, and returns the roots of its
// certificate. Edit changes the recipe.
func (p httpProxy) start(t *testing.T, port, relayAddr string, edit func(string) string) *x509.CertPool {
	t.Helper()
	recipe := contents(t, "docker", "proxies", "ends-tls", p.recipe)
	if edit != nil {
		before := recipe
		if recipe = edit(recipe); recipe == before {
			t.Fatalf("the edit changes nothing in %s", p.recipe)
		}
	}
	dir := t.TempDir()
	pair("site", proxiedName, time.Now())(t, dir)
	conf := filepath.Join(dir, p.recipe)
	// Only the address of the relay changes.
	text := p.around(strings.ReplaceAll(recipe, "127.0.0.1:8080", relayAddr), dir, port)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	background(t, dir, p.path, strings.Split(strings.ReplaceAll(strings.Join(p.run, " "), "$F", conf), " ")...)
	awaitListener(t, "127.0.0.1:"+port)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(readFile(t, filepath.Join(dir, "site.crt"))))
	return roots
}

// endsTLS is the environment of a relay behind a proxy on a port, by the file in
// docker/proxies/ends-tls.
func endsTLS(t *testing.T, port string, more ...string) []string {
	t.Helper()
	env := append(testkit.Environ(t), settings(t, "docker", "proxies", "ends-tls", "derpd.env")...)
	return append(append(env, "DERP_ADDR=127.0.0.1:0", "DERP_PUBLIC_PORT="+port), more...)
}

// TestProxiesThatEndTLS runs the recipes of docker/proxies/ends-tls. Clients by the
// map that the relay prints exchange packets through the proxy, and the relay sees
// their addresses.
func TestProxiesThatEndTLS(t *testing.T) {
	for name, proxy := range map[string]httpProxy{"nginx": nginxProxy(), "Caddy": caddyProxy()} {
		t.Run(name, func(t *testing.T) {
			if proxy.path == "" {
				t.Skipf("no %s on this machine; make caddy builds Caddy", name)
			}
			proxyPort := strconv.Itoa(testkit.FreePort(t))
			sources := newSources(t)
			n := begin(t, endsTLS(t, proxyPort, "DERP_VERIFY_CLIENT_URL="+sources.url))
			relayAddr := n.listeners.https.Addr().String()
			roots := proxy.start(t, proxyPort, relayAddr, nil)

			r := region(t, parsePolicy(t, n.printed))
			if r.Nodes[0].HostName != proxiedName || fmt.Sprint(r.Nodes[0].DERPPort) != proxyPort {
				t.Fatalf("node %+v, want %s and the proxy's port %s", r.Nodes[0], proxiedName, proxyPort)
			}
			exchangeOver(t, r, func(c *derphttp.Client) { c.TLSConfig = testkit.Trust(roots) })

			// A native client and clients in a browser come from 127.0.0.9.
			native := testkit.URLClient(t, "https://"+proxiedName+"/derp", key.NewNode())
			native.TLSConfig = testkit.Trust(roots)
			native.SetURLDialer(func(ctx context.Context, network, _ string) (net.Conn, error) {
				d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.0.0.9")}}
				return d.DialContext(ctx, network, "127.0.0.1:"+proxyPort)
			})
			testkit.MustAdmit(t, native)
			sources.want(t, n, native.SelfPublicKey(), "127.0.0.9")
			for _, claim := range []string{"", "198.51.100.1", "127.0.0.1"} {
				c := dialWebSocketFrom(t, "127.0.0.9", "127.0.0.1:"+proxyPort, testkit.Trust(roots), claim)
				sources.want(t, n, c.SelfPublicKey(), "127.0.0.9")
			}
			// These clients do not use the proxy.
			for _, from := range []string{"127.0.0.8", "127.0.0.9"} {
				c := dialWebSocketFrom(t, from, relayAddr, nil, "198.51.100.1")
				sources.want(t, n, c.SelfPublicKey(), from)
			}
			// STUN does not pass the proxy.
			askedBeside(t, net.JoinHostPort("127.0.0.2", fmt.Sprint(port(n.listeners.stun.LocalAddr()))))
			if got := n.checkProxies(t.Context()); got.Level != healthz.OK {
				t.Errorf("health: %s", got.Detail)
			}
		})
	}
}

// keepalive is the longest time between two frames that derpserver sends to an idle
// client: a minute, and a jitter of up to five seconds.
const keepalive = 65 * time.Second

// No recipe disconnects an idle client: each time limit is far above the keepalive.
func TestProxiesKeepIdleClients(t *testing.T) {
	limit := regexp.MustCompile(`(?m)^\s*(?:proxy_timeout|proxy_read_timeout|proxy_send_timeout|timeout client|timeout server|stream_timeout|read_timeout|write_timeout)\s+(\w+)`)
	for recipe, want := range map[string]int{
		"nginx.conf": 1, "haproxy.cfg": 2, "Caddyfile": 0, "traefik.yaml": 0,
		"ends-tls/nginx.conf": 2, "ends-tls/Caddyfile": 0, "ends-tls/traefik.yaml": 0,
	} {
		found := limit.FindAllStringSubmatch(contents(t, "docker", "proxies", filepath.FromSlash(recipe)), -1)
		if len(found) != want {
			t.Errorf("%s has %d time limits, want %d", recipe, len(found), want)
		}
		for _, line := range found {
			if d, err := time.ParseDuration(line[1]); err != nil || d < 2*keepalive {
				t.Errorf("%s: %q: %v, want twice the keepalive of %s at least", recipe, strings.TrimSpace(line[0]), err, keepalive)
			}
		}
	}
}

// traefikFile has the keys of Traefik's dynamic configuration that the recipes use
// (doc.traefik.io, reference of the file provider).
type traefikFile struct {
	HTTP *traefikRouting `yaml:"http"`
	TCP  *traefikRouting `yaml:"tcp"`
}

type traefikRouting struct {
	Routers map[string]struct {
		EntryPoints []string `yaml:"entryPoints"`
		Rule        string   `yaml:"rule"`
		Service     string   `yaml:"service"`
		TLS         *struct {
			Passthrough  bool   `yaml:"passthrough"`  // of TCP
			CertResolver string `yaml:"certResolver"` // of HTTP
		} `yaml:"tls"`
	} `yaml:"routers"`
	Services map[string]struct {
		LoadBalancer struct {
			PassHostHeader *bool                           `yaml:"passHostHeader"` // of HTTP
			ProxyProtocol  *struct{ Version int }          `yaml:"proxyProtocol"`  // of TCP
			Servers        []struct{ Address, URL string } `yaml:"servers"`
		} `yaml:"loadBalancer"`
	} `yaml:"services"`
}

// Traefik is not run. Its recipes have known keys alone, and lead from the relay's
// name to the address in the relay's settings.
func TestTraefik(t *testing.T) {
	read := func(parts ...string) traefikFile {
		dec := yaml.NewDecoder(bytes.NewReader([]byte(contents(t, append([]string{"docker", "proxies"}, parts...)...))))
		dec.KnownFields(true)
		var f traefikFile
		if err := dec.Decode(&f); err != nil {
			t.Fatal(err)
		}
		return f
	}
	const name = "derpd"
	passes, ends := read("traefik.yaml"), read("ends-tls", "traefik.yaml")
	if passes.HTTP != nil || ends.TCP != nil || passes.TCP == nil || ends.HTTP == nil {
		t.Fatal("want TCP routing where TLS passes, and HTTP routing where TLS ends")
	}
	tcp, http := passes.TCP.Routers[name], ends.HTTP.Routers[name]
	if tcp.Rule != "HostSNI(`"+proxiedName+"`)" || !tcp.TLS.Passthrough || tcp.Service != name {
		t.Errorf("TCP router %+v", tcp)
	}
	if http.Rule != "Host(`"+proxiedName+"`)" || http.TLS == nil || http.TLS.Passthrough || http.Service != name {
		t.Errorf("HTTP router %+v", http)
	}
	address := func(file ...string) string {
		for _, line := range settings(t, append([]string{"docker", "proxies"}, file...)...) {
			if value, ok := strings.CutPrefix(line, "DERP_ADDR="); ok {
				return value
			}
		}
		return ""
	}
	if got, want := passes.TCP.Services[name].LoadBalancer.Servers[0].Address, address("derpd.env"); got != want {
		t.Errorf("TCP leads to %q, want DERP_ADDR %q", got, want)
	}
	if got, want := ends.HTTP.Services[name].LoadBalancer.Servers[0].URL, "http://"+address("ends-tls", "derpd.env"); got != want {
		t.Errorf("HTTP leads to %q, want DERP_ADDR %q", got, want)
	}
}
