package config

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"derpd/certs"
	"derpd/relay"
	"derpd/relay/derpmap"
)

// good loads a configuration that must be valid.
func good(t *testing.T, pairs ...string) *Config {
	t.Helper()
	c, err := Load(append([]string{"DERP_DATA_DIR=" + t.TempDir(), "DERP_TAILSCALED_SOCKET=/nonexistent"}, pairs...))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func equal[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: got %+v, want %+v", what, got, want)
	}
}

func TestDefaults(t *testing.T) {
	c := good(t)
	equal(t, "listen", c.Listen, Listen{HTTPS: ":443", HTTP: ":80", STUN: ":3478", Admin: "127.0.0.1:9090", TCP: TCP{Unsent: 16384}})
	equal(t, "domains", len(c.Domains), 0)
	equal(t, "mode", c.Certificate.Mode, ModePinned)
	equal(t, "certificates", c.Storage.CertDir, filepath.Join(c.Storage.DataDir, "certs"))
	equal(t, "pinned", c.Certificate.Pinned.Path, filepath.Join(c.Storage.DataDir, "certs", "pinned.pem"))
	equal(t, "node key", c.Storage.NodeKeyFile(), filepath.Join(c.Storage.DataDir, "node.key"))
	equal(t, "admission", c.Admission, Admission{Grace: 24 * time.Hour, Interval: time.Minute})
	equal(t, "open", c.Open(), true)
	equal(t, "region", c.Region, Region{
		Node:      derpmap.Node{RegionID: 900, RegionCode: "derpd", RegionName: "derpd", Name: "900a"},
		Discovery: []string{"derp1.tailscale.com:3478", "derp3.tailscale.com:3478", "derp4.tailscale.com:3478", "derp7.tailscale.com:3478"},
	})
	equal(t, "meshed", c.Meshed(), false)
	equal(t, "proxies", c.Proxies, Proxies{})
	equal(t, "log", c.Log, Log{Level: zerolog.InfoLevel})
	equal(t, "platform", c.Platform, Platform{})
	equal(t, "warnings", len(c.Warnings), 0)
	equal(t, "public port", c.PublicHTTPSPort(8443), 8443)
}

// The data directory of an image, which no variable names.
func TestDefaultDataDir(t *testing.T) {
	c, _ := Load(nil)
	equal(t, "data directory", c.Storage, Storage{DataDir: "/data", CertDir: "/data/certs"})
}

func TestListen(t *testing.T) {
	unsent := TCP{Unsent: 16384}
	for env, want := range map[string]Listen{
		"DERP_ADDR=192.0.2.1:8443":                                     {HTTPS: "192.0.2.1:8443", HTTP: "192.0.2.1:80", STUN: "192.0.2.1:3478", Admin: "127.0.0.1:9090", TCP: unsent},
		"DERP_ADDR=[::1]:0443 DERP_STUN_PORT=0":                        {HTTPS: "[::1]:443", HTTP: "[::1]:80", STUN: "[::1]:0", Admin: "127.0.0.1:9090", TCP: unsent},
		"DERP_ADDR=localhost:65535 DERP_STUN=fAlSe":                    {HTTPS: "localhost:65535", HTTP: "localhost:80", Admin: "127.0.0.1:9090", TCP: unsent},
		"DERP_CERT_MODE=off":                                           {HTTPS: ":443", STUN: ":3478", Admin: "127.0.0.1:9090", TCP: unsent},
		"DERP_CERT_MODE=off DERP_HTTP_PORT=8080":                       {HTTPS: ":443", HTTP: ":8080", STUN: ":3478", Admin: "127.0.0.1:9090", TCP: unsent},
		"DERP_HTTP_PORT=-1 DERP_STUN_ADDR=[2001:db8::1]":               {HTTPS: ":443", STUN: "[2001:db8::1]:3478", Admin: "127.0.0.1:9090", TCP: unsent},
		"DERP_HTTP_PORT=0 DERP_ADDR=:0 DERP_ADMIN_ADDR=:0":             {HTTPS: ":0", HTTP: ":0", STUN: ":3478", Admin: ":0", TCP: unsent},
		"DERP_HEALTH_ADDR=:8081 DERP_STUN_ADDR=host":                   {HTTPS: ":443", HTTP: ":80", STUN: "host:3478", Admin: "127.0.0.1:9090", Health: ":8081", TCP: unsent},
		"DERP_TCP_UNSENT=0":                                            {HTTPS: ":443", HTTP: ":80", STUN: ":3478", Admin: "127.0.0.1:9090", TCP: TCP{Unsent: 0}},
		"DERP_TCP_UNSENT=4096":                                         {HTTPS: ":443", HTTP: ":80", STUN: ":3478", Admin: "127.0.0.1:9090", TCP: TCP{Unsent: 4096}},
		"DERP_ADDR=:8080 DERP_STUN_PORT=8080 DERP_TCP_CONGESTION=reno": {HTTPS: ":8080", HTTP: ":80", STUN: ":8080", Admin: "127.0.0.1:9090", TCP: TCP{Congestion: "reno", Unsent: 16384}},
	} {
		equal(t, env, good(t, strings.Fields(env)...).Listen, want)
	}
}

func TestNames(t *testing.T) {
	for value, want := range map[string][]string{
		"DERP.Example.com.":                  {"derp.example.com"},
		"a.example.com, b.example.com":       {"a.example.com", "b.example.com"},
		"a.example.com,,203.0.113.7,":        {"a.example.com", "203.0.113.7"},
		"[2001:db8::7]":                      {"2001:db8::7"},
		"2001:DB8::7":                        {"2001:db8::7"},
		"::ffff:203.0.113.7":                 {"203.0.113.7"},
		"xn--fiq228c.example.com":            {"xn--fiq228c.example.com"},
		strings.Repeat("a", 63) + ".example": {strings.Repeat("a", 63) + ".example"},
		longName:                             {longName},
		"1.2.example":                        {"1.2.example"},
	} {
		equal(t, value, good(t, "DERP_DOMAIN="+value).Domains, want)
	}
}

func TestACME(t *testing.T) {
	c := good(t, "DERP_DOMAIN=a.example.com", "DERP_ACME_EMAIL=me@example.com", "DERP_CERT_DIR="+t.TempDir())
	equal(t, "names", c.Certificate.ACME.Names, []string{"a.example.com"})
	equal(t, "directory", c.Certificate.ACME.Directory, certs.Directories["letsencrypt"])
	equal(t, "e-mail", c.Certificate.ACME.Email, "me@example.com")
	equal(t, "certificates", c.Certificate.ACME.Dir, c.Storage.CertDir)
	equal(t, "challenges", c.Certificate.Challenges, Challenges{HTTP: true, TLSALPN: true})
	equal(t, "DNS", c.Certificate.ACME.DNS == nil, true)
	equal(t, "roots", c.Certificate.ACME.Roots == nil && c.Mesh.Roots == nil, true)

	for env, want := range map[string]Challenges{
		"DERP_ACME_CHALLENGES=http":                       {HTTP: true},
		"DERP_ACME_CHALLENGES=tls-alpn DERP_HTTP_PORT=-1": {TLSALPN: true},
		"DERP_HTTP_PORT=-1":                               {HTTP: true, TLSALPN: true},
	} {
		equal(t, env, good(t, append(strings.Fields(env), "DERP_DOMAIN=a.example.com")...).Certificate.Challenges, want)
	}
	for authority, want := range map[string]string{
		"letsencrypt": certs.Directories["letsencrypt"], "letsencrypt-staging": certs.Directories["letsencrypt-staging"],
		"zerossl": certs.Directories["zerossl"], "https://ca.example.com/directory": "https://ca.example.com/directory",
	} {
		equal(t, authority, good(t, "DERP_DOMAIN=a.example.com", "DERP_ACME_CA="+authority).Certificate.ACME.Directory, want)
	}
	for _, mode := range []string{"DERP_CERT_MODE=gcp", "DERP_ACME_CA=google", "DERP_CERT_MODE=gcp DERP_ACME_CA=google"} {
		// Some authorities issue the padded standard form of base64.
		for given, want := range map[string]string{"+/8=": "-_8", "-_8=": "-_8", "-_8": "-_8", "+/8": "-_8"} {
			acme := good(t, append(strings.Fields(mode), "DERP_DOMAIN=a.example.com", "DERP_ACME_EAB_KID=kid", "DERP_ACME_EAB_KEY="+given)...).Certificate.ACME
			equal(t, mode, []string{acme.Directory, acme.EABKeyID, acme.EABKey}, []string{certs.Directories["google"], "kid", want})
		}
	}
	c = good(t, "DERP_DOMAIN=a.example.com", "DERP_CERT_MODE=gcp", "DERP_ACME_EAB_KID=kid", "DERP_ACME_EAB_KEY=c2Vj")
	if text := shown(t, c); !strings.Contains(text, "\nDERP_ACME_CA=google  # default: ") {
		t.Errorf("the authority of mode gcp is not shown:\n%s", text)
	}
}

// DERP_CA_ROOTS are for all servers that the relay asks, in every mode, beside the
// system's roots. With the old name, the authority's server has the roots of the file
// alone.
func TestRoots(t *testing.T) {
	dir := t.TempDir()
	pair("a", "a.example.com", time.Now())(t, dir)
	path := filepath.Join(dir, "a.crt")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := tls.X509KeyPair(data, data)
	if err != nil {
		t.Fatal(err)
	}
	system, err := x509.SystemCertPool()
	if err != nil {
		t.Fatal(err)
	}
	all, own := system.Clone(), x509.NewCertPool()
	all.AddCert(certificate.Leaf)
	own.AddCert(certificate.Leaf)
	for variable, authority := range map[string]*x509.CertPool{"DERP_CA_ROOTS": all, "DERP_ACME_CA_ROOTS": own} {
		for _, env := range []string{
			"DERP_DOMAIN=b.example.com",
			"DERP_DOMAIN=203.0.113.7 DERP_MESH_WITH=b.example.com DERP_MESH_KEY=" + strings.Repeat("0123456789abcdef", 4),
			"DERP_CERT_MODE=off DERP_DOMAIN=b.example.com",
		} {
			c := good(t, append(strings.Fields(env), variable+"="+path)...)
			if !c.Roots.Pool.Equal(own) || c.Roots.Variable != variable {
				t.Errorf("%s: the roots of the file are of %s", env, c.Roots.Variable)
			}
			if !c.Mesh.Roots.Equal(all) {
				t.Errorf("%s, %s: other roots for the other nodes", env, variable)
			}
			if !c.Roots.Pool.Equal(own) || c.Roots.Variable != variable {
				t.Errorf("%s, %s: the private roots are %+v", env, variable, c.Roots)
			}
			if c.Certificate.Mode == ModeLetsEncrypt && !c.Certificate.ACME.Roots.Equal(authority) {
				t.Errorf("%s, %s: other roots for the authority's server", env, variable)
			}
		}
	}
	if c := good(t, "DERP_DOMAIN=b.example.com"); c.Roots.Pool != nil || c.Mesh.Roots != nil || c.Certificate.ACME.Roots != nil {
		t.Error("roots without the variable")
	}
}

func TestManual(t *testing.T) {
	dir := t.TempDir()
	pair("x", "a.example.com", time.Now())(t, dir)
	c := good(t, "DERP_CERT_MODE=manual", "DERP_DOMAIN=a.example.com", "DERP_CERT_FILE="+dir+"/x.crt", "DERP_KEY_FILE="+dir+"/x.key")
	equal(t, "files", c.Certificate.Manual, certs.ManualConfig{CertFile: dir + "/x.crt", KeyFile: dir + "/x.key", Names: []string{"a.example.com"}})
	text := shown(t, c)
	if !strings.Contains(text, "DERP_CERT_FILE="+dir+"/x.crt  # set\n") || !strings.Contains(text, "DERP_ACME_CA=  # default: letsencrypt; google if DERP_CERT_MODE is gcp\n") {
		t.Error(text)
	}

	// derper names the files by the domain, without what may be unsafe.
	pair("2001db87", "2001:db8::7", time.Now())(t, dir)
	c = good(t, "DERP_CERT_MODE=manual", "DERP_DOMAIN=2001:db8::7", "DERP_CERT_DIR="+dir)
	equal(t, "files", c.Certificate.Manual, certs.ManualConfig{CertFile: dir + "/2001db87.crt", KeyFile: dir + "/2001db87.key", Names: []string{"2001:db8::7"}})
	if text := shown(t, c); !strings.Contains(text, "DERP_KEY_FILE="+dir+"/2001db87.key  # default: NAME.key in DERP_CERT_DIR\n") {
		t.Error(text)
	}
}

// An address without files gets a pinned certificate, as with derper. A name does
// not, nor does an address whose files are named.
func TestManualWithoutFiles(t *testing.T) {
	dir := t.TempDir()
	c := good(t, "DERP_CERT_MODE=manual", "DERP_DOMAIN=203.0.113.7", "DERP_CERT_DIR="+dir)
	equal(t, "mode", c.Certificate.Mode, ModePinned)
	equal(t, "manual", c.Certificate.Manual, certs.ManualConfig{})
	equal(t, "pinned", c.Certificate.Pinned, certs.PinnedConfig{Path: dir + "/pinned.pem", Names: []string{"203.0.113.7"}})
	equal(t, "warnings", c.Warnings, []string{"DERP_CERT_MODE is manual, DERP_DOMAIN is an address and " + dir + "/203.0.113.7.crt does not exist: using a pinned certificate, as with DERP_CERT_MODE=pinned"})
	for _, env := range [][]string{
		{"DERP_DOMAIN=a.example.com"},
		{"DERP_DOMAIN=203.0.113.7", "DERP_CERT_FILE=" + dir + "/x.crt", "DERP_KEY_FILE=" + dir + "/x.key"},
	} {
		if _, err := Load(append(append(base(t.TempDir()), "DERP_CERT_MODE=manual", "DERP_CERT_DIR="+dir), env...)); err == nil || !strings.Contains(err.Error(), "no such file") {
			t.Errorf("%q: %v", env, err)
		}
	}
	// Then the directory must be usable, and the pinned certificate valid.
	file("pinned.pem", "nonsense")(t, dir)
	if _, err := Load(append(base(t.TempDir()), "DERP_CERT_MODE=manual", "DERP_CERT_DIR="+dir, "DERP_DOMAIN=203.0.113.7")); err == nil || !strings.HasPrefix(err.Error(), "DERP_CERT_DIR: pinned certificate ") {
		t.Errorf("a damaged pinned certificate: %v", err)
	}
}

// `derpd pin` must work with the certificate that it replaces.
func TestLoadForPin(t *testing.T) {
	dir := t.TempDir()
	file("certs/pinned.pem", "nonsense")(t, dir)
	if _, err := Load(base(dir)); err == nil {
		t.Error("Load takes a damaged pinned certificate")
	}
	if c, err := LoadForPin(base(dir)); err != nil || c.Certificate.Mode != ModePinned {
		t.Error(err)
	}
	if _, err := LoadForPin(append(base(dir), "DERP_REGION_ID=1")); err == nil {
		t.Error("LoadForPin takes a bad region")
	}
}

func TestAdminAddr(t *testing.T) {
	for env, want := range map[string]string{
		"":                                     "127.0.0.1:9090, <nil>",
		"DERP_ADMIN_ADDR=:1":                   ":1, <nil>",
		"DERP_ADMIN_ADDR=:1 DERP_REGION_ID=1":  ":1, <nil>",
		"DERP_ADMIN_ADDR=:1 DERP_ADMIN_ADR=:2": ":1, DERP_ADMIN_ADR: unknown variable; did you mean DERP_ADMIN_ADDR?",
	} {
		addr, err := AdminAddr(strings.Fields(env))
		equal(t, env, fmt.Sprintf("%s, %v", addr, err), want)
	}
}

func TestRegion(t *testing.T) {
	c := good(t, "DERP_REGION_ID=999", "DERP_REGION_CODE=sh.1_a-b", "DERP_REGION_NAME=上海", "DERP_PUBLIC_IPV4=203.0.113.7", "DERP_PUBLIC_IPV6=2001:DB8::7",
		"DERP_PUBLIC_PORT=8443", "DERP_PUBLIC_HTTP_PORT=1", "DERP_PUBLIC_STUN_PORT=-1", "DERP_DISCOVERY=stun.example.com:3478, 192.0.2.1:65535")
	equal(t, "region", c.Region, Region{
		Node:      derpmap.Node{RegionID: 999, RegionCode: "sh.1_a-b", RegionName: "上海", Name: "999a", IPv4: "203.0.113.7", IPv6: "2001:db8::7"},
		HTTPSPort: 8443, HTTPPort: 1, STUNPort: -1,
		Discovery: []string{"stun.example.com:3478", "192.0.2.1:65535"},
	})
	equal(t, "public port", c.PublicHTTPSPort(443), 8443)
	equal(t, "name", good(t, "DERP_NODE_NAME=b1").Region.Node.Name, "b1")
	equal(t, "discovery", len(good(t, "DERP_DISCOVERY=off").Region.Discovery), 0)
	equal(t, "TLS elsewhere", good(t, "DERP_CERT_MODE=off").PublicHTTPSPort(8080), 443)
	equal(t, "TLS elsewhere", good(t, "DERP_CERT_MODE=off", "DERP_PUBLIC_PORT=8443").PublicHTTPSPort(8080), 8443)
	equal(t, "none but a domain", good(t, "DERP_DOMAIN=a.example.com", "DERP_PUBLIC_IPV4=none", "DERP_PUBLIC_IPV6=none").Region.Node.IPv4, "none")
	equal(t, "only IPv6", good(t, "DERP_PUBLIC_IPV4=none", "DERP_PUBLIC_IPV6=2001:db8::7").Region.Node.IPv4, "none")
}

func TestNeedsDiscovery(t *testing.T) {
	for env, want := range map[string]bool{
		"":                             true,
		"DERP_PUBLIC_IPV4=203.0.113.7": true,
		"DERP_PUBLIC_IPV6=2001:db8::7": true,
		"DERP_PUBLIC_IPV6=none":        true,
		"DERP_DOMAIN=203.0.113.7":      false,
		"DERP_DOMAIN=a.example.com":    false,
		"DERP_PUBLIC_IPV4=203.0.113.7 DERP_PUBLIC_IPV6=none": false,
	} {
		equal(t, env, good(t, strings.Fields(env)...).NeedsDiscovery(), want)
	}
}

func TestNamesOfTheNode(t *testing.T) {
	v4, v6 := netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr("2001:db8::7")
	equal(t, "found", good(t).Names(v4, netip.Addr{}), []string{"203.0.113.7"})
	equal(t, "none", len(good(t).Names(netip.Addr{}, netip.Addr{})), 0)
	c := good(t, "DERP_DOMAIN=a.example.com,203.0.113.7", "DERP_PUBLIC_IPV4=203.0.113.8", "DERP_PUBLIC_IPV6=none")
	equal(t, "all", c.Names(v4, v6), []string{"a.example.com", "203.0.113.7", "203.0.113.8", "2001:db8::7"})
	three := good(t, "DERP_DOMAIN=a.example.com,b.example.com,c.example.com") // with room for a fourth
	first := three.Names(v4)
	equal(t, "others", three.Names(v6), []string{"a.example.com", "b.example.com", "c.example.com", "2001:db8::7"})
	equal(t, "the first, unchanged", first, []string{"a.example.com", "b.example.com", "c.example.com", "203.0.113.7"})
	equal(t, "unchanged", c.Domains, []string{"a.example.com", "203.0.113.7"})
}

func TestMesh(t *testing.T) {
	const secret = "a passphrase of some length"
	key, err := relay.ParseMeshKey(secret)
	if err != nil {
		t.Fatal(err)
	}
	for env, want := range map[string][]relay.MeshNode{
		// This node is recognised by what clients dial.
		"DERP_DOMAIN=a.example.com DERP_MESH_WITH=a.example.com,b.example.com":                                                  {{Host: "b.example.com", Port: 443}},
		"DERP_DOMAIN=a.example.com DERP_MESH_WITH=a.example.com:8443":                                                           {{Host: "a.example.com", Port: 8443}},
		"DERP_DOMAIN=a.example.com DERP_MESH_WITH=a.example.com:8443 DERP_ADDR=:8443":                                           nil,
		"DERP_DOMAIN=a.example.com DERP_MESH_WITH=a.example.com:8443 DERP_PUBLIC_PORT=8443":                                     nil,
		"DERP_DOMAIN=a.example.com DERP_MESH_WITH=a.example.com/10.0.0.1":                                                       {{Host: "a.example.com", Port: 443, Dial: "10.0.0.1:443"}},
		"DERP_PUBLIC_IPV4=203.0.113.7 DERP_PUBLIC_IPV6=2001:db8::7 DERP_MESH_WITH=203.0.113.7,[2001:db8::7],203.0.113.8":        {{Host: "203.0.113.8", Port: 443}},
		"DERP_DOMAIN=a.example.com,c.example.com DERP_MESH_WITH=c.example.com,b.example.com DERP_CERT_MODE=off DERP_ADDR=:8080": {{Host: "b.example.com", Port: 443}},
	} {
		c := good(t, append(strings.Fields(env), "DERP_MESH_KEY="+secret)...)
		equal(t, env, c.Mesh.Nodes, want)
		if !c.Meshed() || !c.Mesh.Key.Equal(key) {
			t.Errorf("%s: the key is lost", env)
		}
	}
}

func TestProxies(t *testing.T) {
	prefixes := func(list ...string) (parsed []netip.Prefix) {
		for _, s := range list {
			parsed = append(parsed, netip.MustParsePrefix(s))
		}
		return parsed
	}
	const warning = "DERP_TRUSTED_PROXIES without DERP_PROXY_PROTOCOL is for proxies that terminate TLS and set X-Forwarded-For; through a proxy that forwards TLS, clients can forge their address"
	c := good(t, "DERP_TRUSTED_PROXIES=10.0.0.5, 10.1.0.0/16,fd00::1,128.0.0.0/1")
	equal(t, "trusted", c.Proxies, Proxies{Trusted: prefixes("10.0.0.5/32", "10.1.0.0/16", "fd00::1/128", "128.0.0.0/1")})
	equal(t, "warnings", c.Warnings, []string{warning})
	c = good(t, "DERP_TRUSTED_PROXIES=10.0.0.5", "DERP_PROXY_PROTOCOL=TRUE")
	equal(t, "trusted", c.Proxies, Proxies{Trusted: prefixes("10.0.0.5/32"), ProxyProtocol: true})
	equal(t, "warnings", len(c.Warnings), 0)
	c = good(t, "DERP_TRUSTED_PROXIES=10.0.0.5", "DERP_CERT_MODE=off")
	equal(t, "warnings with TLS elsewhere", len(c.Warnings), 0)
}

func TestWebAndLog(t *testing.T) {
	c := good(t, "DERP_BOOTSTRAP_DNS=a.example.com,b.example.com", "DERP_HOME=https://example.com/", "DERP_LOG_LEVEL=debug", "DERP_LOG_FORMAT=console")
	equal(t, "names", c.Web.BootstrapDNS, []string{"a.example.com", "b.example.com"})
	equal(t, "log", c.Log, Log{Level: zerolog.DebugLevel, Format: LogConsole})
	w := httptest.NewRecorder()
	c.Web.Home.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
	equal(t, "home", w.Header().Get("Location"), "https://example.com/")
	for level, want := range map[string]zerolog.Level{"info": zerolog.InfoLevel, "warn": zerolog.WarnLevel, "error": zerolog.ErrorLevel} {
		equal(t, level, good(t, "DERP_LOG_LEVEL="+level, "DERP_LOG_FORMAT=json").Log, Log{Level: want, Format: LogJSON})
	}
}

// The last GOPROXY counts, as in a shell.
func TestUpdates(t *testing.T) {
	equal(t, "default", good(t).Updates, Updates{})
	equal(t, "updates", good(t, "DERP_UPDATE_CHECK=24h", "GOPROXY=https://a.example", "GOPROXY=https://b.example,direct").Updates,
		Updates{Every: 24 * time.Hour, GoProxy: "https://b.example,direct"})
	equal(t, "the shortest interval", good(t, "DERP_UPDATE_CHECK=1h").Updates.Every, time.Hour)
}

// A directory that cannot be written to is refused only if something is missing.
func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	pinned := certs.PinnedConfig{Path: filepath.Join(dir, "pinned.pem"), Names: []string{"a.example.com"}}
	missing := certs.PinnedConfig{Path: filepath.Join(dir, "none.pem"), Names: []string{"a.example.com"}}
	if err := certs.RotatePinned(pinned, time.Now()); err != nil {
		t.Fatal(err)
	}
	noNames := certs.ACMEConfig{Dir: dir} // nothing is missing
	needsOne := certs.ACMEConfig{Dir: dir, Names: []string{"a.example.com"}, Directory: certs.Directories["letsencrypt"]}
	writable, readOnly := directory{usable: true}, directory{readOnly: errors.New("/x is read-only")}
	const (
		refused = "problem: %s: /x is read-only"
		works   = "%s: /x is read-only; derpd works with the files that are stored there"
		renews  = "%s: /x is read-only; the stored certificate is served, but cannot be renewed"
	)
	for _, tt := range []struct {
		name          string
		data, certDir directory
		hasKey, own   bool
		certificate   Certificate
		variable      string
		want          string // empty for nothing
	}{
		{"all writable", writable, writable, false, true, Certificate{Mode: ModePinned, Pinned: missing}, "", ""},
		{"no key", readOnly, directory{}, false, false, Certificate{Mode: ModeOff}, "DERP_DATA_DIR", refused},
		{"key", readOnly, directory{}, true, false, Certificate{Mode: ModeOff}, "DERP_DATA_DIR", works},
		{"key, manual", readOnly, directory{}, true, false, Certificate{Mode: ModeManual}, "DERP_DATA_DIR", works},
		{"key, no pinned", readOnly, directory{}, true, false, Certificate{Mode: ModePinned, Pinned: missing}, "DERP_DATA_DIR", refused},
		{"key, pinned", readOnly, directory{}, true, false, Certificate{Mode: ModePinned, Pinned: pinned}, "DERP_DATA_DIR", works},
		{"no key, pinned", readOnly, directory{}, false, false, Certificate{Mode: ModePinned, Pinned: pinned}, "DERP_DATA_DIR", refused},
		{"key, no ACME", readOnly, directory{}, true, false, Certificate{Mode: ModeLetsEncrypt, ACME: needsOne}, "DERP_DATA_DIR", refused},
		{"key, ACME", readOnly, directory{}, true, false, Certificate{Mode: ModeLetsEncrypt, ACME: noNames}, "DERP_DATA_DIR", renews},
		{"key, pinned elsewhere", readOnly, writable, true, true, Certificate{Mode: ModePinned, Pinned: missing}, "DERP_DATA_DIR", works},
		{"key, ACME elsewhere", readOnly, writable, true, true, Certificate{Mode: ModeLetsEncrypt, ACME: needsOne}, "DERP_DATA_DIR", works},
		{"own, no pinned", writable, readOnly, false, true, Certificate{Mode: ModePinned, Pinned: missing}, "DERP_CERT_DIR", refused},
		{"own, pinned", writable, readOnly, false, true, Certificate{Mode: ModePinned, Pinned: pinned}, "DERP_CERT_DIR", works},
		{"own, ACME", writable, readOnly, false, true, Certificate{Mode: ModeLetsEncrypt, ACME: noNames}, "DERP_CERT_DIR", renews},
		{"own, no ACME", writable, readOnly, false, true, Certificate{Mode: ModeLetsEncrypt, ACME: needsOne}, "DERP_CERT_DIR", refused},
		{"own, off", writable, readOnly, false, true, Certificate{Mode: ModeOff}, "", ""},
	} {
		p := new(problems)
		got := checkReadOnly(p, tt.data, tt.certDir, tt.hasKey, tt.certificate, tt.own)
		for _, one := range p.found {
			got = append(got, "problem: "+one.err.Error())
		}
		var want []string
		if tt.want != "" {
			want = []string{fmt.Sprintf(tt.want, tt.variable)}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", tt.name, got, want)
		}
	}
}

// In the modes that write no certificate, a directory is not looked at, or only
// whether it is one.
func TestCertDirOfOtherModes(t *testing.T) {
	dir := t.TempDir()
	pair("a.example.com", "a.example.com", time.Now())(t, dir)
	file("pinned.pem", "nonsense")(t, dir)
	good(t, "DERP_CERT_MODE=manual", "DERP_DOMAIN=a.example.com", "DERP_CERT_DIR="+dir)
	good(t, "DERP_CERT_MODE=off", "DERP_CERT_DIR="+dir)
	good(t, "DERP_CERT_DIR="+dir+"/none/yet")
	if _, err := Load(append(base(t.TempDir()), "DERP_CERT_MODE=off", "DERP_CERT_DIR="+dir+"/pinned.pem")); err == nil {
		t.Error("a file is taken for a directory")
	}
}
