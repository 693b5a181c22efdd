package main

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"derpd/relay"
	"derpd/relay/derpmap"
)

// stunServer is a real STUN server, open or silent.
func stunServer(t *testing.T, open bool) string {
	t.Helper()
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	s, err := relay.NewSTUN(relay.STUNConfig{Conn: conn, Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	s.SetOpen(open)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return conn.LocalAddr().String()
}

func TestDiscover(t *testing.T) {
	own := outbound(t.Context(), "udp4")
	if !own.IsValid() {
		t.Skip("this machine has no IPv4 route")
	}
	loopback := netip.MustParseAddr("127.0.0.1")
	answers, silent := stunServer(t, true), stunServer(t, false)
	for name, tt := range map[string]struct {
		servers []string
		want    netip.Addr
	}{
		// Whoever asks over the loopback interface is seen as loopback.
		"the first answer counts":       {[]string{silent, answers, "no such host:1"}, loopback},
		"off":                           {nil, own},
		"nobody answers":                {[]string{silent}, own},
		"nobody can be reached":         {[]string{"127.0.0.1:1", "name.invalid:3478"}, own},
		"a server of the other family":  {[]string{"[::1]:1"}, own},
		"garbage for a server's answer": {[]string{"127.0.0.1:9"}, own},
	} {
		start := time.Now()
		if got := discover(t.Context(), tt.servers).v4; got != tt.want {
			t.Errorf("%s: found %s, want %s", name, got, tt.want)
		}
		if took := time.Since(start); took > 2*discoveryTimeout {
			t.Errorf("%s: took %s", name, took)
		}
	}
}

func TestIsPublic(t *testing.T) {
	for addr, want := range map[string]bool{
		"8.8.8.8": true, "2606:4700::1111": true,
		"10.1.2.3": false, "172.17.0.2": false, "192.168.1.1": false, "100.64.1.1": false, "127.0.0.1": false,
		"169.254.1.1": false, "fd00::1": false, "fe80::1": false, "::1": false, "0.0.0.0": false,
	} {
		if got := isPublic(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %t, want %t", addr, got, want)
		}
	}
}

// The map follows what is configured and what is found.
func TestPublicNode(t *testing.T) {
	v4, v6 := netip.MustParseAddr("198.18.0.9"), netip.MustParseAddr("2606:4700::9")
	for _, tt := range []struct {
		name             string
		env              []string
		found            found
		host, ipv4, ipv6 string
		port, stun, http int
	}{
		{"nothing set", nil, found{v4, v6}, v4.String(), v4.String(), v6.String(), 443, 3478, 80},
		{"IPv6 only", nil, found{v6: v6}, v6.String(), "none", v6.String(), 443, 3478, 80},
		{"nothing found", nil, found{}, "127.0.0.1", "127.0.0.1", "none", 443, 3478, 80},
		{"a name", []string{"DERP_DOMAIN=derp.example.com"}, found{}, "derp.example.com", "", "", 443, 3478, 80},
		{"a name with addresses", []string{"DERP_DOMAIN=derp.example.com", "DERP_PUBLIC_IPV4=198.18.0.1", "DERP_PUBLIC_IPV6=none"}, found{}, "derp.example.com", "198.18.0.1", "none", 443, 3478, 80},
		{"an address", []string{"DERP_DOMAIN=198.18.0.2"}, found{}, "198.18.0.2", "198.18.0.2", "none", 443, 3478, 80},
		{"two addresses", []string{"DERP_DOMAIN=198.18.0.2,2606:4700::2"}, found{}, "198.18.0.2", "198.18.0.2", "2606:4700::2", 443, 3478, 80},
		{"behind a port mapping", []string{"DERP_PUBLIC_PORT=8443", "DERP_PUBLIC_STUN_PORT=13478", "DERP_PUBLIC_HTTP_PORT=8080"}, found{v4: v4}, v4.String(), v4.String(), "none", 8443, 13478, 8080},
		{"other ports", []string{"DERP_ADDR=:9443", "DERP_STUN_PORT=9478", "DERP_HTTP_PORT=-1"}, found{v4: v4}, v4.String(), v4.String(), "none", 9443, 9478, -1},
		{"no STUN", []string{"DERP_STUN=false"}, found{v4: v4}, v4.String(), v4.String(), "none", 443, -1, 80},
		{"off", []string{"DERP_CERT_MODE=off", "DERP_ADDR=:8080", "DERP_DOMAIN=derp.example.com"}, found{}, "derp.example.com", "", "", 443, 3478, -1},
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

// A relay that knows no address of its own makes no certificate: it would be
// for nobody, and stay for ten years. That is no fault of the configuration: the
// start may be tried again, and has left nothing behind.
func TestNoPinnedCertificateWithoutName(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	c, err := loadConfig(dedup(loopbackEnv(t, "DERP_DATA_DIR="+dir)))
	if err != nil {
		t.Fatal(err)
	}
	c.node.IPv4 = derpmap.None // as if none were found
	_, err = newNode(t.Context(), time.Now(), c, zerolog.Nop(), io.Discard)
	if code := exitCode(err, io.Discard); !errors.Is(err, errNoName) || code != exitFailed {
		t.Errorf("exit code %d, %v; want %d, %v", code, err, exitFailed, errNoName)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the start left something behind: %v", err)
	}
}
