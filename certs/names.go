package certs

import (
	"net"
	"net/netip"
	"slices"
)

// split parts DNS names from IP addresses.
func split(subjects []string) (names, addresses []string) {
	for _, s := range subjects {
		if net.ParseIP(s) != nil {
			addresses = append(addresses, s)
		} else {
			names = append(names, s)
		}
	}
	return names, addresses
}

// withoutSNI puts the names first that suit a client which sent no SNI: it has
// dialled an address (RFC 6066 §3). That may be the one at which the connection
// arrived; behind a port mapping it is another one, mostly of that family.
func withoutSNI(names []string, conn net.Conn) []string {
	var local netip.Addr
	if conn != nil {
		if ap, err := netip.ParseAddrPort(conn.LocalAddr().String()); err == nil {
			local = ap.Addr().Unmap().WithZone("")
		}
	}
	fit := func(name string) int {
		addr, err := netip.ParseAddr(name)
		switch {
		case err != nil:
			return 0
		case addr == local:
			return 3
		case addr.Is4() == local.Is4():
			return 2
		}
		return 1
	}
	best := slices.Clone(names)
	slices.SortStableFunc(best, func(a, b string) int { return fit(b) - fit(a) })
	return best
}
