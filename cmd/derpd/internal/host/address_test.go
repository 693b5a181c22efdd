package host

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/rs/zerolog"
	tsstun "tailscale.com/net/stun"

	"derpd/relay/stun"
)

// stunServer is a real STUN server, open or silent.
func stunServer(t *testing.T, open bool) string {
	t.Helper()
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	s, err := stun.New(stun.Config{Conn: conn, Log: zerolog.Nop()})
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

func TestPublicAddresses(t *testing.T) {
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
		// A request over the loopback interface comes from a loopback address.
		"the first answer counts":       {[]string{silent, answers, "no such host:1"}, loopback},
		"off":                           {nil, own},
		"nobody answers":                {[]string{silent}, own},
		"nobody can be reached":         {[]string{"127.0.0.1:1", "name.invalid:3478"}, own},
		"a server of the other family":  {[]string{"[::1]:1"}, own},
		"garbage for a server's answer": {[]string{"127.0.0.1:9"}, own},
	} {
		start := time.Now()
		if got := PublicAddresses(t.Context(), tt.servers).V4; got != tt.want {
			t.Errorf("%s: found %s, want %s", name, got, tt.want)
		}
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("%s: took %s", name, took)
		}
	}
}

// The address that a STUN server has seen replaces the interface's own one, in the
// family of the server alone.
func TestTranslatedAddress(t *testing.T) {
	if !outbound(t.Context(), "udp4").IsValid() {
		t.Skip("this machine has no IPv4 route")
	}
	seen := netip.MustParseAddr("198.18.0.9")
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if tx, err := tsstun.ParseBindingRequest(buf[:n]); err == nil {
				_, _ = conn.WriteToUDPAddrPort(tsstun.Response(tx, netip.AddrPortFrom(seen, 4242)), from)
			}
		}
	}()
	got := PublicAddresses(t.Context(), []string{conn.LocalAddr().String()})
	if got.V4 != seen || got.V6.Is4() {
		t.Errorf("found %+v, want %s and no IPv4 address as V6", got, seen)
	}
	_ = conn.Close()
	<-ended
}

func TestIsPublic(t *testing.T) {
	for addr, want := range map[string]bool{
		"8.8.8.8": true, "2606:4700::1111": true,
		"10.1.2.3": false, "172.17.0.2": false, "192.168.1.1": false, "100.64.1.1": false, "127.0.0.1": false,
		"169.254.1.1": false, "fd00::1": false, "fe80::1": false, "::1": false, "0.0.0.0": false,
	} {
		if got := IsPublic(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %t, want %t", addr, got, want)
		}
	}
}

func TestAddressesList(t *testing.T) {
	v4, v6 := netip.MustParseAddr("198.18.0.9"), netip.MustParseAddr("2606:4700::9")
	for _, tt := range []struct {
		addresses Addresses
		want      []netip.Addr
	}{
		{Addresses{}, nil},
		{Addresses{V4: v4}, []netip.Addr{v4}},
		{Addresses{V6: v6}, []netip.Addr{v6}},
		{Addresses{V4: v4, V6: v6}, []netip.Addr{v4, v6}},
	} {
		if got := tt.addresses.List(); !slices.Equal(got, tt.want) {
			t.Errorf("%+v lists %v, want %v", tt.addresses, got, tt.want)
		}
	}
}
