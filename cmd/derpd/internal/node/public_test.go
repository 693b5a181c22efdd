package node

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/rs/zerolog"

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
		n, _ := publicNode(c, configuredPorts(c.Listen), "", tt.found)
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
