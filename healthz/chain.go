package healthz

import (
	"cmp"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	"tailscale.com/net/bakedroots"

	"derpd/internal/issuer"
)

// judgeChain verifies the chain as sent. A root that this machine does not know is a
// warning, because clients may have it.
func (c Clients) judgeChain(sent []*x509.Certificate, now time.Time) Verdict {
	leaf := sent[0]
	v := verification{leaf: leaf, name: c.verifiedName(), intermediates: x509.NewCertPool()}
	for _, cert := range sent[1:] {
		v.intermediates.AddCert(cert)
	}
	known := slices.DeleteFunc([]*x509.CertPool{c.Roots, bakedroots.Get()}, func(p *x509.CertPool) bool { return p == nil })
	for _, roots := range known {
		if chains, err := v.run(roots, now); err == nil {
			return Verdict{Until: nextDate(chains[0], now, time.Time{})}
		}
	}
	if verdict, bad := c.judgeName(leaf); bad {
		return verdict
	}
	path := pathOf(sent, now)
	if c.Private != nil {
		known = append(known, c.Private)
	}
	if verdict, bad := v.judgeDates(path, known, now); bad {
		return verdict
	}
	top := path[len(path)-1]
	if verdict, bad := v.judgeUse(path, now); bad {
		return verdict
	}
	root := issuerName(top)
	if c.Private != nil {
		if _, err := v.run(c.Private, now); err == nil {
			return warning("clients need "+root+" installed: only "+c.PrivateName+" has it", ownRootFix)
		}
	}
	if address := issuer.PublicURL(leaf); top == leaf && address != "" && !issuer.SelfSigned(leaf) && !c.noRoots() {
		return failed(fmt.Sprintf("the certificate of %s, which issued the relay's, is not sent", root),
			fmt.Sprintf("append it to the certificate file (%s has it)", address))
	}
	return c.unknownRoot(root)
}

const ownRootFix = "install it on every client, or use a certificate of a public authority"

func warning(cause, fix string) Verdict { return Verdict{Level: Warn, Cause: cause, Fix: fix} }

// unknownRoot is the verdict on a good chain whose root clients may not have.
func (c Clients) unknownRoot(root string) Verdict {
	switch {
	case strings.Contains(strings.ToLower(root), "cloudflare origin"):
		return warning("only Cloudflare's proxy trusts "+root+", and clients do not", "use a certificate of a public authority")
	case c.noRoots():
		return warning("this machine has no root certificates, so it is unknown whether clients have "+root, "install the package ca-certificates, or set SSL_CERT_FILE")
	}
	return warning("clients need "+root+" installed: this machine does not know it", ownRootFix)
}

// noRoots reports whether this machine has no roots, by which a public authority is
// recognised.
func (c Clients) noRoots() bool { return c.Roots == nil || c.Roots.Equal(x509.NewCertPool()) }

// verification verifies one leaf in different ways.
type verification struct {
	leaf          *x509.Certificate
	name          string // empty for any
	intermediates *x509.CertPool
}

// run verifies as tlsdial does, which leaves the key usage to the default: serverAuth.
func (v verification) run(roots *x509.CertPool, at time.Time, usages ...x509.ExtKeyUsage) ([][]*x509.Certificate, error) {
	return v.leaf.Verify(x509.VerifyOptions{
		DNSName: v.name, Roots: roots, Intermediates: v.intermediates, CurrentTime: at, KeyUsages: usages,
	})
}

// judgeDates reports a certificate that is not valid now, on the path or among the
// known roots above it.
func (v verification) judgeDates(path []*x509.Certificate, known []*x509.CertPool, now time.Time) (Verdict, bool) {
	for _, roots := range known {
		if chains, err := v.run(roots, v.leaf.NotBefore); err == nil {
			path = append(path, chains[0]...)
		}
	}
	for _, cert := range path {
		if cause := outOfDate(cert, now); cause != "" {
			return failed(cause, dateFix(cert, now)), true
		}
	}
	return Verdict{}, false
}

// judgeUse verifies the path with its last certificate as the root. The rest of the
// chain must be good for every client.
func (v verification) judgeUse(path []*x509.Certificate, now time.Time) (Verdict, bool) {
	for _, cert := range path {
		if issuer.Weak(cert) {
			return failed(fmt.Sprintf("the certificate of %s is signed with %s, which clients refuse", called(cert), cert.SignatureAlgorithm), "have it signed with SHA-256"), true
		}
	}
	roots := x509.NewCertPool()
	roots.AddCert(path[len(path)-1])
	if _, err := v.run(roots, now, x509.ExtKeyUsageAny); err != nil {
		return failed("clients cannot verify the chain: "+strings.TrimPrefix(err.Error(), "x509: "), "replace the certificate file"), true
	}
	if _, err := v.run(roots, now); err != nil {
		return failed("the certificate of "+called(v.leaf)+" is not for servers: its chain lacks the extended key usage serverAuth", "get one with serverAuth"), true
	}
	return Verdict{}, false
}

// pathOf returns the leaf and its issuers among the sent certificates. Of two
// certificates of an issuer, the valid one is chosen.
func pathOf(sent []*x509.Certificate, now time.Time) []*x509.Certificate {
	path := sent[:1:1]
	for {
		last := path[len(path)-1]
		if issuer.SelfSigned(last) {
			return path
		}
		var next *x509.Certificate
		for _, c := range sent[1:] {
			if slices.Contains(path, c) || !issuer.Signed(last, c) {
				continue
			}
			if next == nil || outOfDate(next, now) != "" {
				next = c
			}
		}
		if next == nil {
			return path
		}
		path = append(path, next)
	}
}

// called is the name of a certificate in messages.
func called(c *x509.Certificate) string {
	if list := issuer.Names(c); len(list) > 0 {
		return list[0]
	}
	return quotedName(c.Subject.CommonName, c.Subject.OrganizationalUnit, c.Subject.Organization, c.Subject.String())
}

// issuerName is the name of the issuer of a certificate in messages.
func issuerName(c *x509.Certificate) string {
	return quotedName(c.Issuer.CommonName, c.Issuer.OrganizationalUnit, c.Issuer.Organization, c.Issuer.String())
}

// quotedName is the first of the names that is there.
func quotedName(common string, unit, organization []string, all string) string {
	first := func(list []string) string {
		if len(list) == 0 {
			return ""
		}
		return list[0]
	}
	return fmt.Sprintf("%q", cmp.Or(common, first(unit), first(organization), all))
}
