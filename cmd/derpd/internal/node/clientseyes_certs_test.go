package node

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"time"

	"derpd/internal/testkit"
)

// soon is a date that a relay reaches while a row runs: after its start and its first
// self-check on a busy machine.
func soon() time.Time { return time.Now().Add(8 * time.Second) }

// change changes a certificate that a row makes.
type change = func(*testkit.Certificate)

func until(end time.Time) change { return func(c *testkit.Certificate) { c.NotAfter = end } }

func from(begin time.Time) change { return func(c *testkit.Certificate) { c.NotBefore = begin } }

func forNames(names ...string) change { return func(c *testkit.Certificate) { c.Names = names } }

func with(f func(*x509.Certificate)) change { return func(c *testkit.Certificate) { c.Change = f } }

// usage sets the extended key usages.
func usage(list ...x509.ExtKeyUsage) change {
	return with(func(c *x509.Certificate) { c.ExtKeyUsage = list })
}

// fetchable sets where the issuer's certificate can be fetched, as public authorities
// do.
func fetchable(c *x509.Certificate) {
	c.IssuingCertificateURL = []string{"http://issuer.example/i.crt"}
}

// rootNamed makes the certificate of an authority.
func rootNamed(w *world, name string, change ...change) *tls.Certificate {
	w.Helper()
	return w.certificate(testkit.Certificate{Names: []string{name}, CA: true, NotAfter: time.Now().AddDate(20, 0, 0)}, change)
}

func (w *world) certificate(c testkit.Certificate, change []change) *tls.Certificate {
	w.Helper()
	for _, f := range change {
		f(&c)
	}
	return testkit.NewCertificate(w, c)
}

// intermediate makes the certificate of an authority below a root.
func (w *world) intermediate(root *tls.Certificate, change ...change) *tls.Certificate {
	w.Helper()
	return w.certificate(testkit.Certificate{Names: []string{"Intermediate"}, CA: true, Issuer: root, NotAfter: time.Now().AddDate(5, 0, 0)}, change)
}

// leaf makes a certificate of an authority, or with nil a self-signed one.
func (w *world) leaf(issuer *tls.Certificate, change ...change) *tls.Certificate {
	w.Helper()
	return w.certificate(testkit.Certificate{Names: []string{eyesName}, Issuer: issuer, NotAfter: time.Now().AddDate(0, 0, 80)}, change)
}

// chain makes a leaf and its intermediate.
func (w *world) chain(root *tls.Certificate, change ...change) []*tls.Certificate {
	w.Helper()
	i := w.intermediate(root)
	return []*tls.Certificate{w.leaf(i, change...), i}
}

// everywhere is a row whose words stand in health, log and map.
func everywhere(words string, s situation) situation {
	s.health, s.log, s.note = words, words, words
	return s
}

// certificateRows are about chains of authorities.
func certificateRows() []situation {
	return []situation{
		{name: "a good chain", begin: func(w *world) { w.manual(w.chain(publicRoot)...) }},
		{name: "a good chain with its root", begin: func(w *world) { w.manual(append(w.chain(publicRoot), publicRoot)...) }},
		{name: "a leaf that its root signed", begin: func(w *world) { w.manual(w.leaf(publicRoot)) }},
		{name: "a wildcard", begin: func(w *world) { w.manual(w.chain(publicRoot, forNames("*.example.com"))...) }},
		{name: "a leaf for any use", begin: func(w *world) { w.manual(w.chain(publicRoot, usage(x509.ExtKeyUsageAny))...) }},
		{name: "a leaf without any named use", begin: func(w *world) { w.manual(w.chain(publicRoot, usage())...) }},
		{name: "an old root beside a good one, and expired", begin: func(w *world) {
			// As Let's Encrypt's chain did, which ended in a root that had expired.
			old := rootNamed(w, "Old Root", until(time.Now().Add(-time.Minute)))
			cross := w.intermediate(old, forNames("Public Root"), func(c *testkit.Certificate) {
				c.Key = publicRoot.PrivateKey.(crypto.Signer)
			}, until(time.Now().Add(-time.Minute)))
			w.manual(append(w.chain(publicRoot), cross)...)
		}},
		everywhere(`clients need "Private Root" installed: this machine does not know it`, situation{
			name: "a private root that the client has",
			begin: func(w *world) {
				root := rootNamed(w, "Private Root")
				w.client.AddCert(root.Leaf)
				w.manual(append(w.chain(root), root)...)
			},
		}),
		everywhere(`clients need "Private Root" installed: this machine does not know it`, situation{
			name: "a private root that the client lacks",
			begin: func(w *world) {
				root := rootNamed(w, "Private Root")
				w.manual(append(w.chain(root), root)...)
			},
			client: "certificate signed by unknown authority", lacks: "Private Root",
		}),
		everywhere(`only Cloudflare's proxy trusts "CloudFlare Origin SSL Certificate Authority"`, situation{
			name: "Cloudflare's origin certificate",
			begin: func(w *world) {
				origin := rootNamed(w, "", with(func(c *x509.Certificate) {
					c.Subject = pkix.Name{Organization: []string{"CloudFlare, Inc."}, OrganizationalUnit: []string{"CloudFlare Origin SSL Certificate Authority"}}
				}))
				w.manual(w.leaf(origin), origin)
			},
			client: "certificate signed by unknown authority", lacks: "CloudFlare Origin SSL Certificate Authority",
		}),
		everywhere("this machine has no root certificates, so it is unknown whether clients have", situation{
			name: "a machine without roots",
			begin: func(w *world) {
				w.machine = x509.NewCertPool()
				w.manual(w.chain(publicRoot)...)
			},
		}),
		everywhere("the certificate of derp.example.com expired on ", situation{
			name:   "a leaf that expires while the relay runs",
			begin:  func(w *world) { w.manual(w.chain(publicRoot, until(soon()))...) },
			client: "certificate has expired",
		}),
		everywhere(`the certificate of "Intermediate" expired on `, situation{
			name: "an intermediate that expires while the relay runs",
			begin: func(w *world) {
				i := w.intermediate(publicRoot, until(soon()))
				w.manual(w.leaf(i), i)
			},
			client: "x509: ",
		}),
		everywhere(`the certificate of "Private Root" expired on `, situation{
			name: "a private root that expires while the relay runs",
			begin: func(w *world) {
				root := rootNamed(w, "Private Root", until(soon()))
				w.client.AddCert(root.Leaf)
				w.manual(w.leaf(root), root)
			},
			client: "x509: ",
		}),
	}
}
