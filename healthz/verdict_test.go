package healthz

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"slices"
	"strings"
	"testing"
	"time"

	"tailscale.com/net/tlsdial"

	"derpd/internal/testkit"
)

const judgedName = "derp.example.com"

// made makes a certificate of an issuer, or with nil a self-signed one.
func made(t *testing.T, issuer *tls.Certificate, name string, change ...func(*testkit.Certificate)) *tls.Certificate {
	t.Helper()
	c := testkit.Certificate{Names: []string{name}, Issuer: issuer, NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(48 * time.Hour)}
	for _, f := range change {
		f(&c)
	}
	return testkit.NewCertificate(t, c)
}

func authority(c *testkit.Certificate) { c.CA = true }
func expired(c *testkit.Certificate)   { c.NotAfter = time.Now().Add(-time.Hour) }
func tomorrow(c *testkit.Certificate)  { c.NotBefore = time.Now().Add(24 * time.Hour) }

func changed(f func(*x509.Certificate)) func(*testkit.Certificate) {
	return func(c *testkit.Certificate) { c.Change = f }
}

// handshake is the error of a client of tailscale.com by the same map: see tlsClient of
// its package derphttp. The roots are added to those that the client has.
func handshake(t *testing.T, c Clients, roots *x509.CertPool, chain []*tls.Certificate) error {
	t.Helper()
	config := tlsdial.Config(nil, &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12})
	config.ServerName = c.HostName
	if hash, pinned := strings.CutPrefix(c.CertName, "sha256-raw:"); pinned {
		tlsdial.SetConfigExpectedCertHash(config, hash)
	} else if c.CertName != "" {
		// derphttp passes the roots that tlsdial.Config has removed.
		config.RootCAs = roots
		tlsdial.SetConfigExpectedCert(config, c.CertName)
	}
	served := *chain[0]
	for _, next := range chain[1:] {
		served.Certificate = append(slices.Clone(served.Certificate), next.Certificate[0])
	}
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{served}, MinVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if conn, err := ln.Accept(); err == nil {
			_ = conn.(*tls.Conn).HandshakeContext(ctx)
			_ = conn.Close()
		}
	}()
	conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", ln.Addr().String())
	if err == nil {
		_ = conn.Close()
	}
	_ = ln.Close()
	<-ended
	return err
}

// TestJudge compares each verdict with a client of tailscale.com. All
// clients accept what is OK, and refuse what fails. Only clients that have the root
// accept what has a warning.
func TestJudge(t *testing.T) {
	public := made(t, nil, "Public Root", authority)
	private := made(t, nil, "Private Root", authority)
	good := made(t, public, "Intermediate", authority)
	leaf := made(t, good, judgedName)
	ofPrivate := made(t, private, judgedName)
	third := made(t, private, "Third", authority)
	ofThird := made(t, third, judgedName)
	self := made(t, nil, judgedName)
	pin := func(c *tls.Certificate) string { return "sha256-raw:" + testkit.Hash(c.Leaf) }
	meta := made(t, nil, "derpkey0123")
	fetchable := changed(func(c *x509.Certificate) { c.IssuingCertificateURL = []string{"http://issuer.example/i.crt"} })
	inside := changed(func(c *x509.Certificate) {
		c.IssuingCertificateURL = []string{"ldap:///CN=x", "http://ca.corp.internal/i.crt"}
	})
	usage := func(list ...x509.ExtKeyUsage) func(*testkit.Certificate) {
		return changed(func(c *x509.Certificate) { c.ExtKeyUsage = list })
	}
	sameKey := func(as *tls.Certificate) func(*testkit.Certificate) {
		return func(c *testkit.Certificate) { c.Key = as.PrivateKey.(crypto.Signer) }
	}
	origin := made(t, nil, "", authority, changed(func(c *x509.Certificate) {
		c.Subject = pkix.Name{OrganizationalUnit: []string{"CloudFlare Origin SSL Certificate Authority"}}
	}))
	thirdExpired := made(t, private, "Third", authority, sameKey(third), expired)
	late := made(t, public, "Late", authority, expired)
	early := made(t, public, "Early", authority, tomorrow)
	oldRoot := made(t, nil, "Old Root", authority, expired)
	days := func(n int) func(*testkit.Certificate) {
		return func(c *testkit.Certificate) { c.NotAfter = c.NotBefore.AddDate(0, 0, n) }
	}
	sha1 := made(t, public, "Old Intermediate", authority, changed(func(c *x509.Certificate) { c.SignatureAlgorithm = x509.ECDSAWithSHA1 }))
	issuerAt := func(addresses ...string) func(*testkit.Certificate) {
		return changed(func(c *x509.Certificate) { c.IssuingCertificateURL = addresses })
	}
	chain := func(list ...*tls.Certificate) []*tls.Certificate { return list }

	for _, tt := range []struct {
		name    string
		sent    []*tls.Certificate
		clients Clients
		level   Level
		cause   string // in the verdict
	}{
		{"a good chain", chain(leaf, good), Clients{}, OK, ""},
		{"with the meta certificate", chain(leaf, good, meta), Clients{}, OK, ""},
		{"with its root", chain(leaf, good, public), Clients{}, OK, ""},
		{"in another order", chain(leaf, public, good), Clients{}, OK, ""},
		{"another intermediate as well", chain(leaf, late, good), Clients{}, OK, ""},
		{"an address", chain(leaf, good), Clients{HostName: "198.18.0.1"}, OK, ""},
		{"another CertName", chain(made(t, good, "cert.example.com"), good), Clients{CertName: "cert.example.com"}, OK, ""},
		{"an expired intermediate beside the same one", chain(leaf, made(t, public, "Intermediate", authority, sameKey(good), expired), good), Clients{}, OK, ""},

		{"nothing but the meta certificate", chain(meta), Clients{}, Fail, "no certificate was sent; give this relay a certificate for derp.example.com"},
		{"an expired leaf", chain(made(t, good, judgedName, expired), good), Clients{}, Fail, "the certificate of derp.example.com expired on "},
		{"a leaf of tomorrow", chain(made(t, good, judgedName, tomorrow), good), Clients{}, Fail, "the certificate of derp.example.com is not valid before "},
		{"an expired intermediate", chain(made(t, late, judgedName), late), Clients{}, Fail, `the certificate of "Late" expired on `},
		{"an intermediate of tomorrow", chain(made(t, early, judgedName), early), Clients{}, Fail, `the certificate of "Early" is not valid before `},
		{"an expired private root", chain(made(t, oldRoot, judgedName), oldRoot), Clients{}, Fail, `the certificate of "Old Root" expired on `},
		{"another name", chain(made(t, good, "other.example.com"), good), Clients{}, Fail, "the certificate is for other.example.com, but clients ask for derp.example.com; "},
		{"not the CertName", chain(leaf, good), Clients{CertName: "cert.example.com"}, Fail, "but clients ask for cert.example.com; "},
		{"a common name alone", chain(made(t, good, judgedName, changed(func(c *x509.Certificate) { c.DNSNames = nil })), good), Clients{}, Fail, `and ignore the common name "derp.example.com"`},
		{"a leaf for mail", chain(made(t, good, judgedName, usage(x509.ExtKeyUsageEmailProtection)), good), Clients{}, Fail, "lacks the extended key usage serverAuth"},
		{"a private leaf for mail", chain(made(t, private, judgedName, usage(x509.ExtKeyUsageEmailProtection)), private), Clients{}, Fail, "lacks the extended key usage serverAuth"},
		{"a missing intermediate", chain(made(t, good, judgedName, fetchable)), Clients{}, Fail, `the certificate of "Intermediate", which issued the relay's, is not sent; append it to the certificate file (http://issuer.example/i.crt has it)`},
		{"an issuer that is no authority", chain(made(t, leaf, judgedName), leaf, good), Clients{}, Fail, "clients cannot verify the chain: "},

		{"a private root", chain(ofPrivate, private), Clients{}, Warn, `clients need "Private Root" installed: this machine does not know it; install it on every client`},
		{"a private root that is not sent", chain(ofPrivate), Clients{}, Warn, `clients need "Private Root" installed: this machine does not know it`},
		{"a private intermediate after an expired one", chain(ofThird, thirdExpired, third), Clients{}, Warn, `clients need "Private Root" installed`},
		{"a private root in a variable", chain(ofPrivate), Clients{Private: testkit.Pool(private), PrivateName: "DERP_ROOTS"}, Warn, `clients need "Private Root" installed: only DERP_ROOTS has it`},
		{"an expired private root in a variable", chain(made(t, oldRoot, judgedName)), Clients{Private: testkit.Pool(oldRoot), PrivateName: "DERP_ROOTS"}, Fail, `the certificate of "Old Root" expired on `},
		{"a private issuer that its own network has", chain(made(t, private, judgedName, inside)), Clients{}, Warn, `clients need "Private Root" installed: this machine does not know it`},
		{"no roots here, and a public issuer", chain(made(t, private, judgedName, fetchable)), Clients{Roots: x509.NewCertPool()}, Warn, "this machine has no root certificates"},
		{"Cloudflare's origin", chain(made(t, origin, judgedName)), Clients{}, Warn, `only Cloudflare's proxy trusts "CloudFlare Origin SSL Certificate Authority"`},
		{"a private root, and its address in a directory", chain(made(t, private, judgedName, issuerAt("ldap:///CN=CA", "http://pki.example.com/ca.crt"))), Clients{}, Warn, `clients need "Private Root" installed`},
		{"a private root, and its address at a private name", chain(made(t, private, judgedName, issuerAt("http://pki.corp.internal/ca.crt"))), Clients{}, Warn, `clients need "Private Root" installed`},
		{"825 days", chain(made(t, good, judgedName, days(825)), good), Clients{}, OK, ""},
		{"a private root and 826 days", chain(made(t, private, judgedName, days(826))), Clients{}, Warn, `clients need "Private Root" installed: this machine does not know it, and clients on macOS and iOS refuse the lifetime`},
		{"a pin and 826 days", chain(made(t, nil, judgedName, days(826))), Clients{CertName: "own"}, OK, ""},
		{"a weak signature of an intermediate", chain(made(t, sha1, judgedName), sha1), Clients{}, Fail, `the certificate of "Old Intermediate" is signed with ECDSA-SHA1, which clients refuse; have it signed with SHA-256`},
		{"no roots here", chain(ofPrivate), Clients{Roots: x509.NewCertPool()}, Warn, "this machine has no root certificates"},
		{"a self-signed certificate without a pin", chain(self), Clients{}, Warn, `clients need "derp.example.com" installed`},

		{"a pin", chain(self), Clients{CertName: pin(self)}, OK, ""},
		{"a pin and the meta certificate", chain(self, meta), Clients{CertName: pin(self)}, OK, ""},
		{"a pin and an address", chain(self), Clients{CertName: pin(self), HostName: "198.18.0.1"}, OK, ""},
		{"a pin and any use", chain(made(t, nil, judgedName, usage(x509.ExtKeyUsageClientAuth))), Clients{CertName: "own"}, OK, ""},
		{"a pin and another certificate", chain(self), Clients{CertName: pin(leaf)}, Fail, "but the map has the pin " + testkit.Hash(leaf.Leaf)[:16]},
		{"a pin and another name", chain(self), Clients{CertName: "own", HostName: "other.example.com"}, Fail, "but clients ask for other.example.com"},
		{"a pin and an expired certificate", chain(made(t, nil, judgedName, expired)), Clients{CertName: "own"}, Fail, "the certificate of derp.example.com expired on "},
		{"a pin and a certificate of tomorrow", chain(made(t, nil, judgedName, tomorrow)), Clients{CertName: "own"}, Fail, "is not valid before "},
		{"a pin and a chain", chain(leaf, good), Clients{CertName: "own"}, Fail, "2 certificates are sent, but clients with a pin accept one alone"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := tt.clients
			if c.HostName == "" {
				c.HostName = judgedName
			}
			if c.CertName == "own" {
				c.CertName = pin(tt.sent[0])
			}
			if c.Roots == nil {
				c.Roots = testkit.Pool(public)
			}
			var sent []*x509.Certificate
			for _, cert := range tt.sent {
				sent = append(sent, cert.Leaf)
			}
			v := c.Judge(sent, time.Now())
			if v.Level != tt.level || !strings.Contains(v.String(), tt.cause) || (tt.cause == "") != (v.String() == "") {
				t.Errorf("got %v %q, want %v %q", v.Level, v, tt.level, tt.cause)
			}
			if (v.Err() != nil) != (tt.level == Fail) {
				t.Errorf("the error is %v", v.Err())
			}
			knows, has := testkit.Pool(public), testkit.Pool(public, private, origin, oldRoot, self)
			if err := handshake(t, c, knows, tt.sent); (err == nil) != (tt.level == OK) {
				t.Errorf("a client ends with %v, but the verdict is %v", err, v.Level)
			}
			if err := handshake(t, c, has, tt.sent); (err == nil) != (tt.level != Fail) {
				t.Errorf("a client with the root ends with %v, but the verdict is %v", err, v.Level)
			}
		})
	}
}

// TestPlatforms asserts the warnings about what Go's verifier accepts, and those of other
// systems refuse.
func TestPlatforms(t *testing.T) {
	short, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	shortKey := func(c *testkit.Certificate) { c.Key = short }
	root := made(t, nil, "Root", authority, shortKey)
	strong, weak := made(t, root, "Strong", authority), made(t, root, "Weak", authority, shortKey)
	for _, tt := range []struct {
		name string
		sent []*tls.Certificate
		want string
	}{
		{"a short key of the root", []*tls.Certificate{made(t, strong, judgedName), strong, root}, ""},
		{"a short key", []*tls.Certificate{made(t, strong, judgedName, shortKey), strong}, "clients on macOS, iOS and Windows refuse the RSA key of derp.example.com, which has 1024 bits; get a certificate with an RSA key of 2048 bits or an ECDSA key"},
		{"a short key of an issuer", []*tls.Certificate{made(t, weak, judgedName), weak}, `clients on macOS, iOS and Windows refuse the RSA key of "Weak", which has 1024 bits; get a certificate with an RSA key of 2048 bits or an ECDSA key`},
		{"826 days", []*tls.Certificate{made(t, strong, judgedName, func(c *testkit.Certificate) { c.NotAfter = c.NotBefore.AddDate(0, 0, 826) }), strong}, "clients on macOS and iOS refuse the lifetime of the certificate of derp.example.com, which is 826 days; get a certificate of at most 825 days"},
	} {
		var sent []*x509.Certificate
		for _, c := range tt.sent {
			sent = append(sent, c.Leaf)
		}
		c := Clients{HostName: judgedName, Roots: testkit.Pool(root)}
		if v := c.Judge(sent, time.Now()); v.String() != tt.want || v.Err() != nil || (v.Level == Warn) != (tt.want != "") {
			t.Errorf("%s: %v %q", tt.name, v.Level, v)
		}
		if err := handshake(t, c, testkit.Pool(root), tt.sent); err != nil {
			t.Errorf("%s: a client in Go ends with %v", tt.name, err)
		}
	}
}

// TestExpiredRoot asserts that the root is named if it alone is out of date.
func TestExpiredRoot(t *testing.T) {
	root := made(t, nil, "Public Root", authority)
	old := made(t, nil, "Public Root", authority, expired, func(c *testkit.Certificate) { c.Key = root.PrivateKey.(crypto.Signer) })
	i := made(t, root, "Intermediate", authority)
	c := Clients{HostName: judgedName, Roots: testkit.Pool(old)}
	if v := c.Judge([]*x509.Certificate{made(t, i, judgedName).Leaf, i.Leaf}, time.Now()); v.Level != Fail || !strings.HasPrefix(v.Cause, `the certificate of "Public Root" expired on `) {
		t.Errorf("got %v %q", v.Level, v)
	}
}

// TestJudgements asserts when a verdict is made again: for other certificates, another
// map, after a date of the certificates, and after an hour.
func TestJudgements(t *testing.T) {
	now := time.Now()
	root := made(t, nil, "Root", authority)
	ends := now.Add(90 * time.Minute)
	leaf := made(t, root, judgedName, func(c *testkit.Certificate) { c.NotAfter = ends })
	other := made(t, root, judgedName)
	meta := made(t, nil, "derpkey0123")
	asked := 0
	roots := func() *x509.CertPool { asked++; return testkit.Pool(root) }
	var j Judgements
	for _, step := range []struct {
		name  string
		at    time.Time
		certs []*tls.Certificate
		host  string
		level Level
		made  bool
	}{
		{"the first", now, []*tls.Certificate{leaf}, judgedName, OK, true},
		{"the same", now.Add(time.Minute), []*tls.Certificate{leaf}, judgedName, OK, false},
		{"with the meta certificate", now.Add(time.Minute), []*tls.Certificate{leaf, meta}, judgedName, OK, false},
		{"an hour later", now.Add(61 * time.Minute), []*tls.Certificate{leaf}, judgedName, OK, true},
		{"before the end", ends.Add(-time.Minute), []*tls.Certificate{leaf}, judgedName, OK, false},
		{"after the end", ends.Add(time.Minute), []*tls.Certificate{leaf}, judgedName, Fail, true},
		{"the clock is set back", now, []*tls.Certificate{leaf}, judgedName, OK, true},
		{"another certificate", now, []*tls.Certificate{other}, judgedName, OK, true},
		{"another name", now, []*tls.Certificate{other}, "other.example.com", Fail, true},
	} {
		var sent []*x509.Certificate
		for _, c := range step.certs {
			sent = append(sent, c.Leaf)
		}
		before := asked
		v := j.Of(Clients{HostName: step.host}, roots, sent, step.at)
		if v.Level != step.level || (asked > before) != step.made {
			t.Errorf("%s: %v %q, made %t, want %v, %t", step.name, v.Level, v, asked > before, step.level, step.made)
		}
	}
	self := made(t, nil, judgedName)
	before := asked
	if v := j.Of(Clients{HostName: judgedName, CertName: "sha256-raw:" + testkit.Hash(self.Leaf)}, roots, []*x509.Certificate{self.Leaf}, now); v.Level != OK || asked != before {
		t.Errorf("a pin: %v %q, and the roots were read %d times", v.Level, v, asked-before)
	}
}

func BenchmarkJudgements(b *testing.B) {
	root := testkit.NewCertificate(b, testkit.Certificate{Names: []string{"Root"}, CA: true})
	sent := []*x509.Certificate{testkit.NewCertificate(b, testkit.Certificate{Names: []string{judgedName}, Issuer: root}).Leaf, root.Leaf}
	c, pool := Clients{HostName: judgedName, Roots: testkit.Pool(root)}, testkit.Pool(root)
	b.Run("again", func(b *testing.B) {
		var j Judgements
		for b.Loop() {
			j.Of(c, func() *x509.CertPool { return pool }, sent, time.Now())
		}
	})
	b.Run("anew", func(b *testing.B) {
		for b.Loop() {
			c.Judge(sent, time.Now())
		}
	})
}

// The age of a verdict is by the wall clock, which may be set. With a monotonic time, a
// verdict would stay after the clock was set back.
func TestJudgementsAreByTheWallClock(t *testing.T) {
	t.Parallel()
	var j Judgements
	j.Of(Clients{}, x509.NewCertPool, nil, time.Now())
	if j.judged.IsZero() || j.judged != j.judged.Round(0) {
		t.Errorf("judged at %v", j.judged)
	}
}
