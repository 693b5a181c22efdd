package certs

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"derpd/internal/filekind"
	"derpd/internal/issuer"
)

// chain returns what clients get: the leaf, and each of its issuers that the file
// has, after what it has signed. Copies and unrelated certificates are left out. The
// order in the file does not matter. A self-signed certificate has no other issuer: the
// one that it replaces may have the same name and key.
func (p *pair) chain() []certificate {
	chain := []certificate{p.leaf}
	for i := 0; i < len(chain); i++ {
		for _, c := range p.all {
			known := slices.ContainsFunc(chain, func(other certificate) bool { return other.Equal(c.Certificate) })
			if !known && !issuer.SelfSigned(chain[i].Certificate) && issuer.Signed(chain[i].Certificate, c.Certificate) {
				chain = append(chain, c)
			}
		}
	}
	return chain
}

// unsent describes the blocks of the file that are not in the chain.
func (p *pair) unsent(chain []certificate) []string {
	var list []string
	for _, c := range p.all {
		inChain := func(link certificate) bool { return link.Equal(c.Certificate) }
		if i := slices.IndexFunc(chain, inChain); i < 0 {
			list = append(list, fmt.Sprintf("block %d: %s, not an issuer of the leaf", c.block.Number, title(c.Certificate)))
		} else if first := chain[i].block.Number; first != c.block.Number {
			list = append(list, fmt.Sprintf("block %d: a copy of block %d", c.block.Number, first))
		}
	}
	for _, err := range p.damaged {
		list = append(list, err.Error())
	}
	return list
}

// verify returns an error if every client refuses the chain. Otherwise it returns
// the authority that clients must trust in addition to the system's roots, or "".
func (c ManualConfig) verify(p *pair, chain []certificate, now time.Time) (authority string, err error) {
	leaf := chain[0]
	if len(chain) == 1 && selfIssued(leaf.Certificate) {
		return "", nil // pinned in the map: clients check its hash, names and dates
	}
	if issuer.Weak(leaf.Certificate) {
		return "", explainWeak(leaf)
	}
	options := x509.VerifyOptions{
		Roots: c.Roots, Intermediates: x509.NewCertPool(), CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	tops := x509.NewCertPool()
	for i, link := range chain {
		if i > 0 {
			options.Intermediates.AddCert(link.Certificate)
		}
		above := func(other certificate) bool {
			return !other.Equal(link.Certificate) && issuer.Signed(link.Certificate, other.Certificate)
		}
		if !slices.ContainsFunc(chain, above) {
			tops.AddCert(link.Certificate)
		}
	}
	if _, err := leaf.Verify(options); err == nil {
		return "", nil
	}
	if options.Roots = c.Private; c.Private != nil {
		if paths, err := leaf.Verify(options); err == nil {
			return title(paths[0][len(paths[0])-1]), nil
		}
	}
	// Clients may trust an authority that this machine does not trust. Such a
	// client still refuses everything that is wrong below the last certificate.
	options.Roots = tops
	paths, err := leaf.Verify(options)
	if err != nil {
		return "", c.explainChain(chain, err, now)
	}
	for _, path := range paths {
		switch top := path[len(path)-1]; {
		case selfIssued(top):
			return title(top), nil
		case issuer.PublicURL(top) == "" || noRoots(c.Roots):
			return top.Issuer.String(), nil
		}
	}
	return "", c.explainMissing(p, paths[0][len(paths[0])-1])
}

// noRoots reports whether this machine has no roots, by which a public authority is
// recognised.
func noRoots(roots *x509.CertPool) bool {
	if roots == nil {
		var err error
		if roots, err = x509.SystemCertPool(); err != nil {
			return true
		}
	}
	return roots.Equal(x509.NewCertPool())
}

// explainChain explains the error of a chain that no root can make valid.
func (c ManualConfig) explainChain(chain []certificate, err error, now time.Time) error {
	for _, link := range chain[1:] {
		what := fmt.Sprintf("%s (%s), which signed the certificate or its issuer,", link.block, title(link.Certificate))
		switch {
		case now.After(link.NotAfter):
			return fmt.Errorf("%s expired on %s; put the authority's present one in its place%s", what, link.NotAfter.Format(time.DateOnly), c.fetchIssuer(chain[0].Certificate, "append it to the file:"))
		case now.Before(link.NotBefore):
			return fmt.Errorf("%s is not valid before %s; check the clock of this machine, which is at %s", what, instant(link.NotBefore), instant(now))
		case !link.BasicConstraintsValid || !link.IsCA:
			return fmt.Errorf("%s is not the certificate of an authority (basicConstraints CA:TRUE); have the certificate signed by one", what)
		}
	}
	for _, link := range chain {
		if issuer.Weak(link.Certificate) {
			return explainWeak(link)
		}
	}
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.IncompatibleUsage {
		return fmt.Errorf("%s is not for servers: its extended key usage, or that of an issuer, lacks serverAuth; get a certificate of a server", c.CertFile)
	}
	return fmt.Errorf("%s: every client refuses the chain: %w; get the certificate and its chain again", c.CertFile, err)
}

func explainWeak(c certificate) error {
	return fmt.Errorf("%s (%s) is signed with %s, which clients refuse; have it signed with SHA-256", c.block, title(c.Certificate), c.SignatureAlgorithm)
}

// explainMissing explains that the issuer of top is missing.
func (c ManualConfig) explainMissing(p *pair, top *x509.Certificate) error {
	if len(p.damaged) > 0 {
		return p.damaged[0]
	}
	for _, other := range p.all {
		if bytes.Equal(other.RawSubject, top.RawIssuer) && !other.Equal(top) {
			return fmt.Errorf("%s has the name of the issuer (%s), but another key: it did not sign %s%s",
				other.block, title(other.Certificate), title(top), c.fetchIssuer(top, "append the right one:"))
		}
	}
	return fmt.Errorf("%s: the chain is incomplete: the certificate of %q, which signed %s, is missing%s",
		c.CertFile, top.Issuer, title(top), c.fetchIssuer(top, "append it to the file:"))
}

// fetchIssuer is the end of a message: the command that appends the issuer of a
// certificate. It is empty if the certificate does not say where its issuer is.
func (c ManualConfig) fetchIssuer(of *x509.Certificate, words string) string {
	address := issuer.PublicURL(of)
	if address == "" {
		return ""
	}
	convert := "openssl x509 -inform DER"
	if strings.HasSuffix(address, ".p7c") || strings.HasSuffix(address, ".p7b") {
		convert = "openssl pkcs7 -inform DER -print_certs"
	}
	return fmt.Sprintf("; %s `(echo; curl -sL %s | %s) >> %s`", words, filekind.Quote(address), convert, filekind.Quote(c.CertFile))
}

// selfIssued reports whether a certificate names itself as its issuer. An authority
// with the same name may have signed it.
func selfIssued(c *x509.Certificate) bool { return bytes.Equal(c.RawSubject, c.RawIssuer) }
