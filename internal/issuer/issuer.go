// Package issuer has the names of a certificate, and the relations between it and its
// issuer. certs and healthz apply the same rules with it.
package issuer

import (
	"bytes"
	"crypto/x509"
	"errors"
	"net"
	"net/url"
	"slices"
	"strings"
)

// Names returns the DNS names and the addresses that a certificate is for.
func Names(c *x509.Certificate) []string {
	list := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		list = append(list, ip.String())
	}
	return list
}

// Signed reports whether issuer has the name of c's issuer, and its key made the
// signature of c. The uses that the issuer is made for do not matter. A signature with an
// algorithm that is too weak counts, although its verification fails.
func Signed(c, issuer *x509.Certificate) bool {
	if !bytes.Equal(issuer.RawSubject, c.RawIssuer) {
		return false
	}
	err := issuer.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature)
	_, weak := errors.AsType[x509.InsecureAlgorithmError](err)
	return err == nil || weak
}

// SelfSigned reports whether a certificate is its own issuer.
func SelfSigned(c *x509.Certificate) bool { return Signed(c, c) }

// Weak reports whether verifiers refuse the signature of a certificate for its
// algorithm, as crypto/x509 does. The signature of a root is not verified.
func Weak(c *x509.Certificate) bool {
	list := []x509.SignatureAlgorithm{x509.SHA1WithRSA, x509.ECDSAWithSHA1, x509.DSAWithSHA1, x509.MD5WithRSA, x509.MD2WithRSA}
	return slices.Contains(list, c.SignatureAlgorithm) && !SelfSigned(c)
}

// privateZones are the ends of names that public DNS does not have.
var privateZones = []string{".local", ".localdomain", ".internal", ".intranet", ".private", ".corp", ".home", ".lan", ".arpa"}

// PublicURL returns the URL of the issuer's certificate, if the issuer is a public
// authority by this URL. Public authorities use http, the default port and a public
// name (CA/Browser Forum, TLS Baseline Requirements §7.1.2.7.7). Clients may have the
// issuer of every other certificate installed.
func PublicURL(c *x509.Certificate) string {
	for _, address := range c.IssuingCertificateURL {
		u, err := url.Parse(address)
		if err != nil || u.Scheme != "http" || u.Port() != "" {
			return ""
		}
		host := strings.ToLower(strings.TrimSuffix(u.Hostname(), "."))
		isPrivate := func(zone string) bool { return strings.HasSuffix(host, zone) }
		if !strings.Contains(host, ".") || net.ParseIP(host) != nil || slices.ContainsFunc(privateZones, isPrivate) {
			return ""
		}
	}
	if len(c.IssuingCertificateURL) == 0 {
		return ""
	}
	return c.IssuingCertificateURL[0]
}
