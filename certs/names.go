package certs

import (
	"crypto/x509"
	"net"
	"net/netip"
	"slices"
	"strings"
)

// split separates DNS names from IP addresses.
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

// withoutSNI sorts the names for a client without SNI, the best first. A client
// without SNI has dialled an IP address (RFC 6066 §3). The connection's local address
// is the best. Behind a port mapping the client has dialled another address, mostly
// of the same family.
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

// covered returns the names of a certificate, for messages.
func covered(leaf *x509.Certificate) string {
	names := slices.Clone(leaf.DNSNames)
	for _, ip := range leaf.IPAddresses {
		names = append(names, ip.String())
	}
	if len(names) == 0 {
		return "no name"
	}
	return strings.Join(names, ", ")
}
