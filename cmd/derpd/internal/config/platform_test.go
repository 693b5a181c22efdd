package config

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// Variables that the platforms set.
const (
	onFly     = "FLY_APP_NAME=my-derp FLY_REGION=hkg FLY_PUBLIC_IP=2606:4700::bad FLY_PRIVATE_IP=fdaa::3"
	onRailway = "RAILWAY_PROJECT_ID=p PORT=8080 RAILWAY_TCP_PROXY_DOMAIN=a.proxy.rlwy.net RAILWAY_TCP_PROXY_PORT=35432 RAILWAY_TCP_APPLICATION_PORT=8443"
)

// A platform sets what the operator has not set, and nothing else.
func TestPlatforms(t *testing.T) {
	// The name and the ports of the map.
	type public struct {
		name              string
		https, http, stun int
	}
	flyMap := public{"my-derp.fly.dev", 443, 80, 0}
	railwayMap := public{"a.proxy.rlwy.net", 35432, 0, 0}
	with := func(p public, change func(*public)) public {
		change(&p)
		return p
	}
	for _, tt := range []struct {
		name, env, mode               string
		addr, http, stun, health, dir string
		public                        public
		warnings                      int
	}{
		{
			"Fly.io", onFly, ModePinned,
			":8443", ":8080", "fly-global-services:3478", ":8081", "$D", flyMap, 0,
		},
		{
			"Fly.io with a domain", onFly + " DERP_DOMAIN=derp.example.com", ModeLetsEncrypt,
			":8443", ":8080", "fly-global-services:3478", ":8081", "$D",
			with(flyMap, func(p *public) { p.name = "derp.example.com" }), 0,
		},
		{
			"Fly.io, all set", onFly + " DERP_ADDR=:9443 DERP_HTTP_PORT=-1 DERP_PUBLIC_PORT=9443 DERP_STUN_PORT=3479 DERP_CERT_MODE=letsencrypt DERP_HEALTH_ADDR=:9000", ModeLetsEncrypt,
			":9443", "", "fly-global-services:3479", ":9000", "$D",
			with(flyMap, func(p *public) { p.https = 9443 }), 0,
		},
		{
			"Railway", onRailway + " RAILWAY_VOLUME_MOUNT_PATH=$D/volume", ModePinned,
			":8443", "", "", ":8080", "$D/volume", railwayMap, 0,
		},
		{
			"Railway without a volume", onRailway, ModePinned,
			":8443", "", "", ":8080", "$D", railwayMap, 1,
		},
		{
			"Railway with a domain", onRailway + " DERP_DOMAIN=derp.example.com", ModePinned,
			":8443", "", "", ":8080", "$D",
			with(railwayMap, func(p *public) { p.name = "derp.example.com" }), 1,
		},
		{
			"Railway with a domain proven by DNS", onRailway + " DERP_DOMAIN=derp.example.com DERP_DNS_PROVIDER=desec DERP_DNS_DESEC_TOKEN=t", ModeLetsEncrypt,
			":8443", "", "", ":8080", "$D",
			with(railwayMap, func(p *public) { p.name = "derp.example.com" }), 1,
		},
		{
			"Railway with a domain proven by DNS, all set", onRailway + " DERP_CERT_MODE=letsencrypt DERP_DOMAIN=derp.example.com DERP_DNS_PROVIDER=desec DERP_DNS_DESEC_TOKEN=t", ModeLetsEncrypt,
			":8443", "", "", ":8080", "$D",
			with(railwayMap, func(p *public) { p.name = "derp.example.com" }), 1,
		},
		{
			"Fly.io without STUN in the map", onFly + " DERP_PUBLIC_STUN_PORT=-1", ModePinned,
			":8443", ":8080", "fly-global-services:3478", ":8081", "$D",
			with(flyMap, func(p *public) { p.stun = -1 }), 0,
		},
		{
			"elsewhere", "PORT=8080 DERP_DOMAIN=derp.example.com", ModeLetsEncrypt,
			":443", ":80", ":3478", "", "$D",
			public{"derp.example.com", 443, 0, 0},
			0,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			env := strings.Split(strings.ReplaceAll(tt.env, "$D", dir), " ")
			if !strings.Contains(tt.env, "VOLUME") {
				env = append(env, "DERP_DATA_DIR="+dir)
			}
			c, err := Load(env)
			if err != nil {
				t.Fatal(err)
			}
			got := []string{c.Certificate.Mode, c.Listen.HTTPS, c.Listen.HTTP, c.Listen.STUN, c.Listen.Health, c.Storage.DataDir}
			if want := []string{tt.mode, tt.addr, tt.http, tt.stun, tt.health, strings.ReplaceAll(tt.dir, "$D", dir)}; !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
			if got := (public{c.Domains[0], c.PublicHTTPSPort(PortOf(c.Listen.HTTPS)), c.Region.HTTPPort, c.Region.STUNPort}); got != tt.public {
				t.Errorf("map %+v, want %+v", got, tt.public)
			}
			if len(c.Warnings) != tt.warnings {
				t.Errorf("warnings %q, want %d", c.Warnings, tt.warnings)
			}
		})
	}
}

// Fly.io's proxy is trusted only with DERP_PROXY_PROTOCOL: without PROXY headers it
// forwards whatever its clients send, and all clients have its address.
func TestFlyProxy(t *testing.T) {
	for setting, want := range map[string]string{
		"":                           "",
		" DERP_PROXY_PROTOCOL=false": "",
		" DERP_PROXY_PROTOCOL=true":  "172.16.0.0/12",
		" DERP_PROXY_PROTOCOL=true DERP_TRUSTED_PROXIES=fdaa::/16": "fdaa::/16",
	} {
		c, err := Load(strings.Split(onFly+setting+" DERP_DATA_DIR="+t.TempDir(), " "))
		if err != nil {
			t.Error(err)
			continue
		}
		if got := strings.Trim(fmt.Sprint(c.Proxies.Trusted), "[]"); got != want || c.Proxies.ProxyProtocol != (want != "") {
			t.Errorf("%s: trusts %s, PROXY protocol %t; want %s", setting, got, c.Proxies.ProxyProtocol, want)
		}
		if l := c.Limits; (l.PerAddress > 0) != (want != "") || (l.AcceptRate > 0) != (want != "") {
			t.Errorf("%s: the limits of one address are %d and %d", setting, l.PerAddress, l.AcceptRate)
		}
	}
}

// `derpd env` shows which values the platform has set.
func TestPlatformIsTheSource(t *testing.T) {
	c, err := Load(strings.Split(onFly+" DERP_HTTP_PORT=-1 DERP_DATA_DIR="+t.TempDir(), " "))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"DERP_ACCEPT_RATE", "DERP_ADDR", "DERP_CERT_MODE", "DERP_DOMAIN", "DERP_HEALTH_ADDR", "DERP_MAX_PER_ADDRESS", "DERP_PUBLIC_HTTP_PORT", "DERP_PUBLIC_PORT", "DERP_STUN_ADDR"}
	if c.Platform.Name != "Fly.io" || !slices.Equal(c.Platform.Assumed, want) {
		t.Errorf("platform %+v, want %q", c.Platform, want)
	}
	text := shown(t, c)
	for _, want := range []string{
		"DERP_ADDR=:8443  # Fly.io\n",
		"DERP_DOMAIN=my-derp.fly.dev  # Fly.io\n",
		"DERP_HTTP_PORT=-1  # set\n",
		"DERP_STUN_PORT=3478  # default\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("derpd env lacks %q:\n%s", want, text)
		}
	}
}
