package relay

import (
	"net/netip"
	"testing"
)

// A network contains an address in each of its forms: as IPv4 in IPv6, as a
// listener on both families has it, and with the zone of an interface.
func TestContains(t *testing.T) {
	networks := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fe80::/64")}
	for addr, want := range map[string]bool{
		"10.1.2.3": true, "::ffff:10.1.2.3": true, "fe80::1": true, "fe80::1%eth0": true,
		"11.1.2.3": false, "::ffff:11.1.2.3": false, "fe80:1::1%eth0": false, "::1": false,
	} {
		if got := contains(networks, netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %t, want %t", addr, got, want)
		}
	}
	if contains(nil, netip.MustParseAddr("10.1.2.3")) {
		t.Error("no network contains an address")
	}
}
