package certs

import (
	"cmp"
	"crypto/x509"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"derpd/internal/filekind"
	"derpd/internal/issuer"
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
	return cmp.Or(strings.Join(issuer.Names(leaf), ", "), "no name")
}

// explainName explains why a certificate does not cover a name.
func (c ManualConfig) explainName(leaf *x509.Certificate, name string) error {
	if cn := leaf.Subject.CommonName; len(leaf.DNSNames) == 0 && len(leaf.IPAddresses) == 0 && cn != "" {
		command := "openssl req -x509 -days 3650 -out " + filekind.Quote(c.CertFile)
		if !selfIssued(leaf) {
			command = "openssl req -new -out " + filekind.Quote(c.CertFile+".csr")
		}
		command += fmt.Sprintf(" -key %s -subj %s -addext %s", filekind.Quote(c.KeyFile), filekind.Quote("/CN="+cn), altNames(c.Names))
		return fmt.Errorf("%s names %s in its common name alone, which clients ignore; make it again with a subject alternative name: `%s`", c.CertFile, cn, command)
	}
	if net.ParseIP(name) != nil && slices.Contains(leaf.DNSNames, name) {
		return fmt.Errorf("%s has the address %s as a DNS name, which clients ignore; make it again with %s", c.CertFile, name, altNames([]string{name}))
	}
	for _, covers := range leaf.DNSNames {
		zone, wildcard := strings.CutPrefix(covers, "*")
		if wildcard && (strings.HasSuffix(name, zone) || name == zone[1:]) {
			return fmt.Errorf("%s covers %s, not %s: a wildcard stands for exactly one label; get a certificate for %[3]s", c.CertFile, covered(leaf), name)
		}
	}
	return fmt.Errorf("%s covers %s, not %s; get a certificate for every name in DERP_DOMAIN", c.CertFile, covered(leaf), name)
}

// altNames returns names in the form of openssl's -addext.
func altNames(names []string) string {
	var list []string
	for _, name := range names {
		if net.ParseIP(name) != nil {
			list = append(list, "IP:"+name)
		} else {
			list = append(list, "DNS:"+name)
		}
	}
	return "subjectAltName=" + strings.Join(list, ",")
}
