package main

import (
	"errors"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"derpd/cmd/derpd/internal/host"
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
		c, err := loadConfig(append([]string{"DERP_DATA_DIR=" + t.TempDir()}, tt.env...))
		if err != nil {
			t.Fatal(err)
		}
		n, _ := publicNode(c, asConfigured(c), "", tt.found)
		if n.HostName != tt.host || n.IPv4 != tt.ipv4 || n.IPv6 != tt.ipv6 || n.Port != tt.port || n.STUNPort != tt.stun || n.HTTPPort != tt.http {
			t.Errorf("%s: got %+v", tt.name, n)
		}
	}
}

// TestNoPinnedCertificateWithoutName asserts that a relay without any address
// makes no certificate: no client would accept it, and it would stay for ten
// years. The exit code allows a retry, and the data directory is unchanged.
func TestNoPinnedCertificateWithoutName(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	c, err := loadConfig(dedup(loopbackEnv(t, "DERP_DATA_DIR="+dir)))
	if err != nil {
		t.Fatal(err)
	}
	c.node.IPv4 = derpmap.None // no address is found either
	_, err = newNode(t.Context(), time.Now(), c, zerolog.Nop(), io.Discard)
	if code := exitCode(err, io.Discard); !errors.Is(err, errNoName) || code != exitFailed {
		t.Errorf("exit code %d, %v; want %d, %v", code, err, exitFailed, errNoName)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the start left something behind: %v", err)
	}
}
