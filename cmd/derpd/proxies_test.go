package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"tailscale.com/derp/derphttp"

	"derpd/certs/acmetest"
	"derpd/healthz"
)

// The name in docker/proxies.
const proxiedName = "derp.example.com"

// A proxy has port 443. Through it the relay gets its certificate, and two
// clients that know only the printed map reach each other; other names lead
// elsewhere.
func TestBehindProxies(t *testing.T) {
	for _, tt := range []struct {
		program, recipe string

		// around makes a whole configuration of the recipe for dir, which
		// it may write to.
		around func(recipe, dir string) string

		check, run []string // arguments; $F is the configuration
	}{
		{
			"nginx", "nginx.conf",
			func(recipe, dir string) string {
				head := "daemon off;\npid " + dir + "/nginx.pid;\nevents {}\n"
				// Debian builds it as a module, others build it in.
				if module := "/usr/lib/nginx/modules/ngx_stream_module.so"; exists(module) {
					head = "load_module " + module + ";\n" + head
				}
				return head + recipe
			},
			[]string{"-t", "-e", "stderr", "-c", "$F"},
			[]string{"-e", "stderr", "-c", "$F"},
		},
		{
			"haproxy", "haproxy.cfg",
			func(recipe, _ string) string { return recipe },
			[]string{"-c", "-f", "$F"},
			[]string{"-db", "-f", "$F"},
		},
	} {
		t.Run(tt.program, func(t *testing.T) {
			path := program(t, tt.program, "/usr/sbin/"+tt.program)
			proxyPort, err := freePort(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			website := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				_, _ = w.Write([]byte("website"))
			}))
			t.Cleanup(website.Close)

			authority := acmetest.Start(t)
			env := append(loopbackEnv(t), settings(t, "docker", "proxies", "derpd.env")...)
			env = append(env, "DERP_ADDR=127.0.0.1:0", "DERP_PUBLIC_PORT="+proxyPort,
				"DERP_ACME_CA="+authority.Directory, "DERP_ACME_CA_ROOTS="+authority.RootsFile)
			n := begin(t, env, func(n *node) {
				// As an operator would: the recipe with other addresses.
				recipe := strings.NewReplacer(
					"127.0.0.1:8443", n.listeners.https.Addr().String(),
					"127.0.0.1:4430", website.Listener.Addr().String(),
					"listen 443", "listen 127.0.0.1:"+proxyPort, "listen [::]:443", "listen [::1]:"+proxyPort,
					"bind :443", "bind 127.0.0.1:"+proxyPort, "bind :::443", "bind ::1:"+proxyPort,
				).Replace(contents(t, "docker", "proxies", tt.recipe))
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
				port, err := strconv.Atoi(proxyPort)
				if err != nil {
					t.Fatal(err)
				}
				authority.Validate(t, 0, port)
			})

			r := region(t, parsePolicy(t, n.printed))
			if r.Nodes[0].HostName != proxiedName || fmt.Sprint(r.Nodes[0].DERPPort) != proxyPort {
				t.Fatalf("node %+v, want %s and the proxy's port %s", r.Nodes[0], proxiedName, proxyPort)
			}
			roots := authority.Roots()
			exchangeOver(t, r, func(c *derphttp.Client) { c.TLSConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12} })
			if got := throughProxy(t, proxyPort, website); got != "website" {
				t.Errorf("another name leads to %q, want the website", got)
			}
			// STUN is beside the proxy, on both families and on all addresses.
			for _, host := range []string{"127.0.0.2", "::1"} {
				askedBeside(t, net.JoinHostPort(host, fmt.Sprint(port(n.listeners.stun.LocalAddr()))))
			}
		})
	}
}

// settings reads a file of NAME=value lines.
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
			t.Logf("%s said:\n%s", path, out.String())
		}
	})
}

// awaitListener waits until something accepts connections on addr.
func awaitListener(t *testing.T, addr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
		if err == nil {
			_ = conn.Close()
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("nothing listens on %s: %v", addr, err)
		case <-tick.C:
		}
	}
}

// throughProxy is what a browser gets for another name.
func throughProxy(t *testing.T, proxyPort string, website *httptest.Server) string {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(website.Certificate())
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		// httptest's certificate is for this name.
		TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "example.com", MinVersion: tls.VersionTLS12},
	}}
	return do(t, client, http.MethodGet, "https://127.0.0.1:"+proxyPort+"/", nil).body
}

// askedBeside asks STUN at addr, which must see this client's address.
func askedBeside(t *testing.T, addr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
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
