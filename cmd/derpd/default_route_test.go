package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestOnlyDefaultRoutesHaveTheGateway puts one route at a time into the kernel's
// tables of a container. Only the default route leads to the gateway in whose
// name the engine sends packets.
func TestOnlyDefaultRoutesHaveTheGateway(t *testing.T) {
	hex4 := func(addr string) string { // as the machine has it in memory
		b := netip.MustParseAddr(addr).As4()
		return fmt.Sprintf("%08X", binary.NativeEndian.Uint32(b[:]))
	}
	hex6 := func(addr string) string {
		return strings.ReplaceAll(netip.MustParseAddr(addr).StringExpanded(), ":", "")
	}
	v4 := func(to, mask, gateway, flags string) string {
		return "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n" +
			strings.Join([]string{"eth0", hex4(to), hex4(gateway), flags, "0", "0", "0", hex4(mask), "0", "0", "0"}, "\t") + "\n"
	}
	v6 := func(to, length, gateway, flags string) string {
		return strings.Join([]string{hex6(to), length, hex6("::"), "00", hex6(gateway), "00000400", "00000002", "00000000", flags, "eth0"}, " ") + "\n"
	}
	for name, tt := range map[string]struct {
		table, route string
		want         []string
	}{
		"the default route":                  {"route", v4("0.0.0.0", "0.0.0.0", "172.17.0.1", "0003"), []string{"172.17.0.1"}},
		"half of all addresses":              {"route", v4("0.0.0.0", "128.0.0.0", "172.17.0.1", "0003"), nil}, // a VPN's
		"the other half":                     {"route", v4("128.0.0.0", "128.0.0.0", "172.17.0.1", "0003"), nil},
		"a network of its own":               {"route", v4("10.0.0.0", "255.0.0.0", "172.17.0.1", "0003"), nil},
		"a default route that is down":       {"route", v4("0.0.0.0", "0.0.0.0", "172.17.0.1", "0002"), nil},
		"a default route without a gateway":  {"route", v4("0.0.0.0", "0.0.0.0", "0.0.0.0", "0001"), nil},
		"the default route, IPv6":            {"ipv6_route", v6("::", "00", "fd00::1", "00000003"), []string{"fd00::1"}},
		"half of all addresses, IPv6":        {"ipv6_route", v6("::", "01", "fd00::1", "00000003"), nil},
		"a network of its own, IPv6":         {"ipv6_route", v6("fd01::", "40", "fd00::1", "00000003"), nil},
		"a default route that is down, IPv6": {"ipv6_route", v6("::", "00", "fd00::1", "00000002"), nil},
		"no gateway, IPv6":                   {"ipv6_route", v6("::", "00", "::", "00000001"), nil},
	} {
		root := t.TempDir()
		if err := os.MkdirAll(filepath.Join(root, "proc", "net"), 0o700); err != nil {
			t.Fatal(err)
		}
		for path, content := range map[string]string{".dockerenv": "", filepath.Join("proc", "net", tt.table): tt.route} {
			if err := os.WriteFile(filepath.Join(root, path), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		var got []string
		for _, addr := range containerGateways(root, func(string) string { return "veth" }) {
			got = append(got, addr.String())
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: gateways %q, want %q", name, got, tt.want)
		}
	}
}
