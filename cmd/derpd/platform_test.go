package main

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"derpd/relay/derpmap"

	"derpd/cmd/derpd/internal/host"
)

// What the platforms put into the environment.
const (
	onFly     = "FLY_APP_NAME=my-derp FLY_REGION=hkg FLY_PUBLIC_IP=2606:4700::bad FLY_PRIVATE_IP=fdaa::3"
	onRailway = "RAILWAY_PROJECT_ID=p PORT=8080 RAILWAY_TCP_PROXY_DOMAIN=a.proxy.rlwy.net RAILWAY_TCP_PROXY_PORT=35432 RAILWAY_TCP_APPLICATION_PORT=8443"
)

// A platform decides what nobody has set, and nothing else.
func TestPlatforms(t *testing.T) {
	flyMap := derpmap.Node{RegionID: 900, RegionCode: "derpd", RegionName: "derpd", Name: "900a", HostName: "my-derp.fly.dev", Port: 443, STUNPort: 3478, HTTPPort: 80}
	railwayMap := derpmap.Node{RegionID: 900, RegionCode: "derpd", RegionName: "derpd", Name: "900a", HostName: "a.proxy.rlwy.net", Port: 35432, STUNPort: -1, HTTPPort: -1}
	with := func(n derpmap.Node, change func(*derpmap.Node)) derpmap.Node {
		change(&n)
		return n
	}
	for _, tt := range []struct {
		name, env, mode               string
		addr, http, stun, health, dir string
		node                          derpmap.Node
		warnings                      int
	}{
		{
			"Fly.io", onFly, modePinned,
			":8443", ":8080", "fly-global-services:3478", ":8081", "$D", flyMap, 0,
		},
		{
			"Fly.io with a domain", onFly + " DERP_DOMAIN=derp.example.com", modeLetsEncrypt,
			":8443", ":8080", "fly-global-services:3478", ":8081", "$D",
			with(flyMap, func(n *derpmap.Node) { n.HostName = "derp.example.com" }), 0,
		},
		{
			"Fly.io, all set", onFly + " DERP_ADDR=:9443 DERP_HTTP_PORT=-1 DERP_PUBLIC_PORT=9443 DERP_STUN_PORT=3479 DERP_CERT_MODE=letsencrypt DERP_HEALTH_ADDR=:9000", modeLetsEncrypt,
			":9443", "", "fly-global-services:3479", ":9000", "$D",
			with(flyMap, func(n *derpmap.Node) { n.Port, n.STUNPort, n.HTTPPort = 9443, 3479, -1 }), 0,
		},
		{
			"Railway", onRailway + " RAILWAY_VOLUME_MOUNT_PATH=$D/volume", modePinned,
			":8443", "", "", ":8080", "$D/volume", railwayMap, 0,
		},
		{
			"Railway without a volume", onRailway, modePinned,
			":8443", "", "", ":8080", "$D", railwayMap, 1,
		},
		{
			"Railway with a domain", onRailway + " DERP_DOMAIN=derp.example.com", modePinned,
			":8443", "", "", ":8080", "$D",
			with(railwayMap, func(n *derpmap.Node) { n.HostName = "derp.example.com" }), 1,
		},
		{
			"Railway with a domain proven by DNS", onRailway + " DERP_DOMAIN=derp.example.com DERP_DNS_PROVIDER=desec DERP_DNS_DESEC_TOKEN=t", modeLetsEncrypt,
			":8443", "", "", ":8080", "$D",
			with(railwayMap, func(n *derpmap.Node) { n.HostName = "derp.example.com" }), 1,
		},
		{
			"elsewhere", "PORT=8080 DERP_DOMAIN=derp.example.com", modeLetsEncrypt,
			":443", ":80", ":3478", "", "$D",
			with(flyMap, func(n *derpmap.Node) { n.HostName = "derp.example.com" }), 0,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			env := strings.Split(strings.ReplaceAll(tt.env, "$D", dir), " ")
			if !strings.Contains(tt.env, "VOLUME") {
				env = append(env, "DERP_DATA_DIR="+dir)
			}
			c, err := loadConfig(env)
			if err != nil {
				t.Fatal(err)
			}
			got := []string{c.mode, c.addr, c.httpAddr, c.stunAddr, c.health, c.dataDir}
			if want := []string{tt.mode, tt.addr, tt.http, tt.stun, tt.health, strings.ReplaceAll(tt.dir, "$D", dir)}; !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
			if n, _ := publicNode(c, asConfigured(c), "", host.Addresses{}); n != tt.node {
				t.Errorf("map %+v, want %+v", n, tt.node)
			}
			if len(c.warnings) != tt.warnings {
				t.Errorf("warnings %q, want %d", c.warnings, tt.warnings)
			}
		})
	}
}

// Fly.io's proxy is believed only where its header is asked for: without one it
// hands on whatever its clients send.
func TestFlyProxy(t *testing.T) {
	for setting, want := range map[string]string{
		"":                           "",
		" DERP_PROXY_PROTOCOL=false": "",
		" DERP_PROXY_PROTOCOL=true":  "172.16.0.0/12",
		" DERP_PROXY_PROTOCOL=true DERP_TRUSTED_PROXIES=fdaa::/16": "fdaa::/16",
	} {
		c, err := loadConfig(strings.Split(onFly+setting+" DERP_DATA_DIR="+t.TempDir(), " "))
		if err != nil {
			t.Error(err)
			continue
		}
		if got := strings.Trim(fmt.Sprint(c.trustedProxies), "[]"); got != want || c.proxyProtocol != (want != "") {
			t.Errorf("%s: trusts %s, PROXY protocol %t; want %s", setting, got, c.proxyProtocol, want)
		}
	}
}

// An operator sees what came from the platform.
func TestPlatformIsTheSource(t *testing.T) {
	l, err := loadEnvironment(strings.Split(onFly+" DERP_HTTP_PORT=-1", " "))
	if err != nil {
		t.Fatal(err)
	}
	shown := l.effective(nil)
	for _, want := range []string{
		"DERP_ADDR=:8443  # Fly.io\n",
		"DERP_DOMAIN=my-derp.fly.dev  # Fly.io\n",
		"DERP_HTTP_PORT=-1  # set\n",
		"DERP_STUN_PORT=3478  # default\n",
	} {
		if !strings.Contains(shown, want) {
			t.Errorf("derpd env lacks %q:\n%s", want, shown)
		}
	}
}

// A platform asks for health from outside, by any host name, and learns
// nothing else.
func TestHealthForAPlatform(t *testing.T) {
	n := begin(t, loopbackEnv(t, "DERP_HEALTH_ADDR=127.0.0.1:0"))
	base := "http://" + n.listeners.health.Addr().String()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for path, want := range map[string]response{
		"/readyz":  {status: http.StatusOK, body: "ready\n"},
		"/healthz": {status: http.StatusNotFound, body: "404 page not found\n"},
		"/derpmap": {status: http.StatusNotFound, body: "404 page not found\n"},
		"/metrics": {status: http.StatusNotFound, body: "404 page not found\n"},
		"/":        {status: http.StatusNotFound, body: "404 page not found\n"},
	} {
		if got := do(t, client, http.MethodGet, base+path, nil); got.status != want.status || got.body != want.body {
			t.Errorf("%s: %d %q, want %d %q", path, got.status, got.body, want.status, want.body)
		}
	}
	n.health.Stopping()
	if got := do(t, client, http.MethodGet, base+"/readyz", nil); got.status != http.StatusServiceUnavailable || got.body != "not ready\n" {
		t.Errorf("stopping: %d %q", got.status, got.body)
	}
}
