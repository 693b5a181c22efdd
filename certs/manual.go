package certs

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/rs/zerolog"
)

// ManualConfig names a certificate and a key that another program renews.
type ManualConfig struct {
	CertFile string // PEM: the leaf first, then its issuers
	KeyFile  string // PEM; may be CertFile

	// Names are the names that the certificate must cover.
	Names []string

	// Roots are the authorities that clients trust; nil for the system's.
	Roots *x509.CertPool

	// Changed is called when clients need a new map for the certificate in use.
	// certName is the Pin of the new [Status]. Changed must not call the manager.
	Changed func(certName string)

	// Private are roots that only this relay is known to have; nil for none.
	Private *x509.CertPool

	Log zerolog.Logger
}

// LoadManual loads a certificate and its key. The manager reloads both when a file
// changes.
//
// LoadManual refuses files with which every client fails. The key must belong to the
// first certificate. This certificate must cover every name, and must be valid now with
// its issuers. LoadManual logs an authority that this machine does not trust, since
// clients may trust it.
//
// New files that change the map wait for Accept: a self-signed certificate with another
// pin, or one of an authority in place of a self-signed one.
func LoadManual(c ManualConfig) (Manager, error) {
	return newFiles([]string{c.CertFile, c.KeyFile}, c.load, c.Changed, c.Log)
}

func (c ManualConfig) load() (loaded, error) {
	p, err := c.read()
	if err != nil {
		return loaded{}, err
	}
	found, err := c.check(p, time.Now())
	found.check = func(now time.Time) error {
		_, err := c.check(p, now)
		return err
	}
	return found, err
}

// check returns an error if every client refuses the certificate.
func (c ManualConfig) check(p *pair, now time.Time) (loaded, error) {
	leaf := p.leaf
	for _, name := range c.Names {
		if leaf.VerifyHostname(name) != nil {
			return loaded{}, c.explainName(leaf.Certificate, name)
		}
	}
	if now.After(leaf.NotAfter) {
		return loaded{}, fmt.Errorf("%s expired on %s; renew it", c.CertFile, leaf.NotAfter.Format(time.DateOnly))
	}
	if now.Before(leaf.NotBefore) {
		return loaded{}, fmt.Errorf("%s is not valid before %s; check the clock of this machine, which is at %s", c.CertFile, instant(leaf.NotBefore), instant(now))
	}
	chain := p.chain()
	authority, err := c.verify(p, chain, now)
	if err != nil {
		return loaded{}, err
	}
	cert := &tls.Certificate{PrivateKey: p.key, Leaf: leaf.Certificate}
	for _, link := range chain {
		cert.Certificate = append(cert.Certificate, link.Raw)
	}
	return loaded{cert: cert, authority: authority, unsent: p.unsent(chain)}, nil
}

// instant formats a time for messages about clocks.
func instant(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }
