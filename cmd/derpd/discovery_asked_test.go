package main

import (
	"context"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tailscale.com/net/stun"

	"derpd/cmd/derpd/internal/host"
	"derpd/internal/testkit"
)

// stunSaying starts a STUN server that answers every request with one address,
// as if the client were behind a router, and counts the requests.
func stunSaying(t *testing.T, address string) (server string, asked *atomic.Int64) {
	t.Helper()
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	asked = new(atomic.Int64)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if tx, err := stun.ParseBindingRequest(buf[:n]); err == nil {
				asked.Add(1)
				_, _ = conn.WriteToUDPAddrPort(stun.Response(tx, netip.AddrPortFrom(netip.MustParseAddr(address), 4242)), from)
			}
		}
	}()
	t.Cleanup(func() {
		_ = conn.Close()
		<-ended
	})
	return conn.LocalAddr().String(), asked
}

// TestDiscoveryIsAsked asserts when the map of a relay asks STUN servers for the
// public address: while one of the two addresses is unknown and no domain leads
// to the relay.
func TestDiscoveryIsAsked(t *testing.T) {
	if !host.PublicAddresses(t.Context(), nil).V4.IsValid() {
		t.Skip("this machine has no IPv4 route")
	}
	const found = "198.18.0.9"
	for name, tt := range map[string]struct {
		env   []string
		asked bool
		ipv4  string // in the map
	}{
		"neither is set":  {[]string{"DERP_PUBLIC_IPV4=", "DERP_PUBLIC_IPV6="}, true, found},
		"IPv4 is not set": {[]string{"DERP_PUBLIC_IPV4=", "DERP_PUBLIC_IPV6=2606:4700::1"}, true, found},
		"IPv6 is not set": {[]string{"DERP_PUBLIC_IPV4=198.18.0.1", "DERP_PUBLIC_IPV6="}, true, "198.18.0.1"},
		"both are set":    {[]string{"DERP_PUBLIC_IPV4=198.18.0.1", "DERP_PUBLIC_IPV6=2606:4700::1"}, false, "198.18.0.1"},
		"one is none":     {[]string{"DERP_PUBLIC_IPV4=198.18.0.1", "DERP_PUBLIC_IPV6=none"}, false, "198.18.0.1"},
		"a domain":        {[]string{"DERP_PUBLIC_IPV4=", "DERP_PUBLIC_IPV6=", "DERP_DOMAIN=derp.example.com"}, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			server, asked := stunSaying(t, found)
			env := testkit.Environ(t, append(tt.env, "DERP_CERT_MODE=off", "DERP_DISCOVERY="+server)...)
			ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
			defer cancel()
			var out strings.Builder
			if err := run(ctx, time.Now(), []string{"derpmap", "--format", "json"}, testkit.LastOfEach(env), &out, io.Discard); err != nil {
				t.Fatal(err)
			}
			if got := asked.Load() > 0; got != tt.asked {
				t.Errorf("a STUN server was asked: %t, want %t", got, tt.asked)
			}
			want := `"IPv4": "` + tt.ipv4 + `"`
			if got := strings.Contains(out.String(), want); got != (tt.ipv4 != "") {
				t.Errorf("want %s in the map:\n%s", want, out.String())
			}
		})
	}
}

// TestDiscoveredAddressIsServed asserts that a running relay puts the address that
// a STUN server has returned into the map, and into its pinned certificate.
func TestDiscoveredAddressIsServed(t *testing.T) {
	const found = "198.18.0.9"
	conn, err := new(net.Dialer).DialContext(t.Context(), "udp4", "198.51.100.1:9") // sends nothing
	if err != nil {
		t.Skipf("this machine has no IPv4 route: %v", err)
	}
	_ = conn.Close()
	server, _ := stunSaying(t, found)
	p := startProgram(t, testkit.Environ(t, "DERP_PUBLIC_IPV4=", "DERP_PUBLIC_IPV6=none", "DERP_DISCOVERY="+server))
	testkit.Until(t, "the map is printed", func() bool { return p.stdout.String() != "" })
	for _, want := range []string{`"IPv4": "` + found + `"`, `"HostName": "` + found + `"`} {
		if !strings.Contains(strings.Join(strings.Fields(p.stdout.String()), " "), want) {
			t.Errorf("the map lacks %s:\n%s", want, p.stdout.String())
		}
	}
	if health := p.page(t, "/readyz"); !strings.Contains(health, "certificate: pinned, "+found) {
		t.Errorf("the certificate does not cover %s:\n%s", found, health)
	}
}
