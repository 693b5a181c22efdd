package certs

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"time"
)

// LoadManual reads a certificate (leaf first, then its intermediates) and its
// key, both PEM. The pair must match, cover every name, be valid now, and be
// complete: the chain must lead to a root that roots knows, or to a
// self-signed certificate in the file. Nil roots are the system's.
func LoadManual(certFile, keyFile string, names []string, roots *x509.CertPool, now time.Time) (Manager, error) {
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("loading %s and %s: %w", certFile, keyFile, err)
	}
	leaf := cert.Leaf
	for _, name := range names {
		if leaf.VerifyHostname(name) != nil {
			return nil, fmt.Errorf("%s covers %s, not %s", certFile, covered(leaf), name)
		}
	}
	if now.After(leaf.NotAfter) {
		return nil, fmt.Errorf("%s expired on %s", certFile, leaf.NotAfter.Format(time.DateOnly))
	}
	if now.Before(leaf.NotBefore) {
		return nil, fmt.Errorf("%s is not valid before %s; is the clock right?", certFile, leaf.NotBefore.Format(time.DateOnly))
	}
	if err := checkChain(cert.Certificate, roots, now); err != nil {
		return nil, fmt.Errorf("%s: %w", certFile, err)
	}
	pin := ""
	if len(cert.Certificate) == 1 && selfSigned(leaf) {
		pin = Pin(leaf)
	}
	return newFixed(&cert, pin), nil
}

// checkChain finds the chain that phones miss and desktop browsers do not
// (tailscale/tailscale#7126).
func checkChain(ders [][]byte, roots *x509.CertPool, now time.Time) error {
	chain := make([]*x509.Certificate, len(ders))
	intermediates := x509.NewCertPool()
	for i, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("certificate %d: %w", i+1, err)
		}
		chain[i] = c
		if i > 0 {
			intermediates.AddCert(c)
		}
	}
	for i, c := range chain[:len(chain)-1] {
		if err := c.CheckSignatureFrom(chain[i+1]); err != nil {
			return fmt.Errorf("certificate %d was not signed by the next one in the file (%s): put the leaf first, then each issuer", i+1, chain[i+1].Subject)
		}
	}
	last := chain[len(chain)-1]
	if selfSigned(last) {
		return nil
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return fmt.Errorf("the chain is incomplete: the certificate of %q is missing; append it to the file", last.Issuer)
	}
	return nil
}

func selfSigned(c *x509.Certificate) bool { return bytes.Equal(c.RawSubject, c.RawIssuer) }
