package relay

import (
	"crypto/tls"
	"crypto/x509"
	"net/netip"
	"slices"
	"strings"
)

// names are the DNS names and addresses that clients dial; see Config.Names.
type names []string

// dialed reports whether clients of this relay send the server name. A client that
// dials an address sends none (RFC 6066 §3).
func (n names) dialed(serverName string) bool {
	if serverName == "" {
		return len(n) == 0 || slices.ContainsFunc(n, func(name string) bool {
			_, err := netip.ParseAddr(name)
			return err == nil
		})
	}
	return slices.ContainsFunc(n, func(name string) bool { return strings.EqualFold(name, serverName) })
}

// own reports whether serverName is a name of this relay, by the configuration or
// by its certificate.
func (n names) own(serverName string, cert *tls.Certificate) bool {
	if n.dialed(serverName) {
		return true
	}
	if serverName == "" || len(cert.Certificate) == 0 {
		return false
	}
	leaf := cert.Leaf
	if leaf == nil {
		var err error
		if leaf, err = x509.ParseCertificate(cert.Certificate[0]); err != nil {
			return false
		}
	}
	return leaf.VerifyHostname(serverName) == nil
}
