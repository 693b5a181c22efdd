package node

import (
	"crypto/tls"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"derpd/certs"
	"derpd/cmd/derpd/internal/config"
	"derpd/cmd/derpd/internal/host"
	"derpd/internal/testkit"
	"derpd/relay/derpmap"
)

// The map follows what is configured and what is found.
func TestPublicNode(t *testing.T) {
	v4, v6 := netip.MustParseAddr("198.18.0.9"), netip.MustParseAddr("2606:4700::9")
	for _, tt := range []struct {
		name             string
		env              []string
		found            host.Addresses
		host, ipv4, ipv6 string
		port, stun, http int
	}{
		{"nothing set", nil, host.Addresses{V4: v4, V6: v6}, v4.String(), v4.String(), v6.String(), 443, 3478, 80},
		{"IPv6 only", nil, host.Addresses{V6: v6}, v6.String(), "none", v6.String(), 443, 3478, 80},
		{"nothing found", nil, host.Addresses{}, "127.0.0.1", "127.0.0.1", "none", 443, 3478, 80},
		{"a name", []string{"DERP_DOMAIN=derp.example.com"}, host.Addresses{}, "derp.example.com", "", "", 443, 3478, 80},
		{"a name with addresses", []string{"DERP_DOMAIN=derp.example.com", "DERP_PUBLIC_IPV4=198.18.0.1", "DERP_PUBLIC_IPV6=none"}, host.Addresses{}, "derp.example.com", "198.18.0.1", "none", 443, 3478, 80},
		{"an address", []string{"DERP_DOMAIN=198.18.0.2"}, host.Addresses{}, "198.18.0.2", "198.18.0.2", "none", 443, 3478, 80},
		{"two addresses", []string{"DERP_DOMAIN=198.18.0.2,2606:4700::2"}, host.Addresses{}, "198.18.0.2", "198.18.0.2", "2606:4700::2", 443, 3478, 80},
		{"behind a port mapping", []string{"DERP_PUBLIC_PORT=8443", "DERP_PUBLIC_STUN_PORT=13478", "DERP_PUBLIC_HTTP_PORT=8080"}, host.Addresses{V4: v4}, v4.String(), v4.String(), "none", 8443, 13478, 8080},
		{"other ports", []string{"DERP_ADDR=:9443", "DERP_STUN_PORT=9478", "DERP_HTTP_PORT=-1"}, host.Addresses{V4: v4}, v4.String(), v4.String(), "none", 9443, 9478, -1},
		{"no STUN", []string{"DERP_STUN=false"}, host.Addresses{V4: v4}, v4.String(), v4.String(), "none", 443, -1, 80},
		{"off", []string{"DERP_CERT_MODE=off", "DERP_ADDR=:8080", "DERP_DOMAIN=derp.example.com"}, host.Addresses{}, "derp.example.com", "", "", 443, 3478, -1},
	} {
		c, err := config.Load(append([]string{"DERP_DATA_DIR=" + t.TempDir()}, tt.env...))
		if err != nil {
			t.Fatal(err)
		}
		n, _ := publicNode(c, configuredPorts(c.Listen), "", tt.found, c.Open())
		if n.HostName != tt.host || n.IPv4 != tt.ipv4 || n.IPv6 != tt.ipv6 || n.Port != tt.port || n.STUNPort != tt.stun || n.HTTPPort != tt.http {
			t.Errorf("%s: got %+v", tt.name, n)
		}
	}
}

// TestNoPinnedCertificateWithoutName asserts that a relay without any address
// makes no certificate: no client would accept it, and it would stay for ten
// years. A later start may succeed, and the data directory is unchanged.
func TestNoPinnedCertificateWithoutName(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	c, err := config.Load(testkit.LastOfEach(testkit.Environ(t, "DERP_DATA_DIR="+dir)))
	if err != nil {
		t.Fatal(err)
	}
	c.Region.Node.IPv4 = derpmap.None // as if none were found
	_, err = New(t.Context(), c, Options{Log: zerolog.Nop()})
	if _, bind := errors.AsType[BindError](err); !errors.Is(err, errNoName) || bind {
		t.Errorf("got %v, want %v", err, errNoName)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the start left something behind: %v", err)
	}
}

// TestStoppedMapNotesTheCertificate asserts that the map of a relay that does not run
// has the warnings about its certificate.
func TestStoppedMapNotesTheCertificate(t *testing.T) {
	const name = "derp.example.com"
	private := testkit.NewAuthority(t)
	for what, tt := range map[string]struct {
		chain []*tls.Certificate // nil for mode pinned
		roots *tls.Certificate   // of DERP_CA_ROOTS
		want  string             // in the comments; empty for no comment about the certificate
	}{
		"public":                   {chain: []*tls.Certificate{testkit.NewCertificate(t, testkit.Certificate{Names: []string{name}, Issuer: publicRoot})}},
		"private":                  {chain: []*tls.Certificate{testkit.NewCertificate(t, testkit.Certificate{Names: []string{name}, Issuer: private})}, want: `# The certificate: clients need "Test Root" installed: this machine does not know it.`},
		"private in DERP_CA_ROOTS": {chain: []*tls.Certificate{testkit.NewCertificate(t, testkit.Certificate{Names: []string{name}, Issuer: private})}, roots: private, want: `# The certificate: clients need "Test Root" installed: only DERP_CA_ROOTS has it.`},
		"self-signed":              {chain: []*tls.Certificate{testkit.SelfSigned(t, name)}},
		"pinned":                   {},
	} {
		dir := t.TempDir()
		env := testkit.Environ(t, "DERP_DOMAIN="+name, "DERP_CERT_MODE=pinned", "DERP_CERT_DIR="+dir)
		if tt.chain == nil {
			if err := certs.RotatePinned(certs.PinnedConfig{Path: filepath.Join(dir, "pinned.pem"), Names: []string{name}}, time.Now()); err != nil {
				t.Fatal(err)
			}
		} else {
			testkit.WritePair(t, filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key"), tt.chain...)
			env = append(env, "DERP_CERT_MODE=manual")
		}
		if tt.roots != nil {
			file("roots.pem", string(testkit.ChainPEM(tt.roots)))(t, dir)
			env = append(env, "DERP_CA_ROOTS="+filepath.Join(dir, "roots.pem"))
		}
		c, err := config.Load(testkit.LastOfEach(env))
		if err != nil {
			t.Fatal(err)
		}
		for _, format := range []string{"policy", "headscale"} {
			text, err := StoppedMap(t.Context(), c, format)
			if err != nil {
				t.Fatal(err)
			}
			// The policy format has // for comments.
			got := strings.ReplaceAll(string(text), "// ", "# ")
			if tt.want == "" && strings.Contains(got, "The certificate: ") || tt.want != "" && (!strings.Contains(got, tt.want) || !strings.Contains(got, "# To correct it: ")) {
				t.Errorf("%s, %s: want %q in\n%s", what, format, tt.want, text)
			}
		}
	}
}
