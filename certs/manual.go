package certs

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/rs/zerolog"
)

// ManualConfig names a certificate and a key that another program renews.
type ManualConfig struct {
	CertFile string // PEM: the leaf first, then its issuers
	KeyFile  string // PEM

	// Names are the names that the certificate must cover.
	Names []string

	// Roots are the authorities that clients trust; nil for the system's.
	Roots *x509.CertPool

	Log zerolog.Logger
}

// LoadManual loads a certificate and its key. The manager reloads both when a file
// changes.
//
// The key must belong to the certificate. The certificate must cover every name
// and be valid now. The chain must end at a trusted root, or with a self-signed
// certificate in the file.
func LoadManual(c ManualConfig) (Manager, error) {
	return newFiles([]string{c.CertFile, c.KeyFile}, c.load, c.Log)
}

func (c ManualConfig) load() (*tls.Certificate, error) {
	cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("loading %s and %s: %w", c.CertFile, c.KeyFile, err)
	}
	leaf, now := cert.Leaf, time.Now()
	for _, name := range c.Names {
		if leaf.VerifyHostname(name) != nil {
			return nil, fmt.Errorf("%s covers %s, not %s; get a certificate for every name in DERP_DOMAIN", c.CertFile, covered(leaf), name)
		}
	}
	if now.After(leaf.NotAfter) {
		return nil, fmt.Errorf("%s expired on %s; renew it", c.CertFile, leaf.NotAfter.Format(time.DateOnly))
	}
	if now.Before(leaf.NotBefore) {
		return nil, fmt.Errorf("%s is not valid before %s; check the clock of this machine", c.CertFile, leaf.NotBefore.Format(time.DateOnly))
	}
	if err := checkChain(cert.Certificate, c.Roots, now); err != nil {
		return nil, fmt.Errorf("%s: %w", c.CertFile, err)
	}
	return &cert, nil
}

// checkChain reports a chain that is out of order or incomplete. Desktop browsers
// accept an incomplete chain, and phones refuse it (tailscale/tailscale#7126).
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
			return fmt.Errorf("certificate %d was not signed by the next one in the file (%s); put the leaf first, then each issuer", i+1, chain[i+1].Subject)
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
