package certs_test

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"derpd/certs"
	"derpd/internal/testkit"
)

const relayName = "derp.example.com"

// pki is an authority with an intermediate, and files made with them.
type pki struct {
	root, middle, leaf *tls.Certificate
	key                []byte
}

func newPKI(t testing.TB) pki {
	t.Helper()
	p := pki{root: authority(t, "Test Root", nil, nil)}
	p.middle = authority(t, "Test Intermediate", p.root, nil)
	p.leaf = testkit.NewCertificate(t, testkit.Certificate{Names: []string{relayName}, Issuer: p.middle})
	p.key = testkit.KeyPEM(t, p.leaf)
	return p
}

func authority(t testing.TB, name string, issuer *tls.Certificate, change func(*x509.Certificate)) *tls.Certificate {
	t.Helper()
	return testkit.NewCertificate(t, testkit.Certificate{Names: []string{name}, CA: true, Issuer: issuer, Change: change})
}

// server signs a certificate for relayName, with a change.
func server(t testing.TB, issuer *tls.Certificate, change func(*x509.Certificate)) *tls.Certificate {
	t.Helper()
	return testkit.NewCertificate(t, testkit.Certificate{Names: []string{relayName}, Issuer: issuer, Change: change})
}

// openssl runs the real program, or skips the test without it.
func openssl(t *testing.T, input []byte, args ...string) []byte {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed")
	}
	run := exec.CommandContext(t.Context(), "openssl", args...)
	run.Stdin = bytes.NewReader(input)
	out, err := run.Output()
	if err != nil {
		t.Fatal(errors.Join(err, errors.New(strings.Join(args, " "))))
	}
	return out
}

var commands = regexp.MustCompile("`([^`]*)`")

// mend runs the commands of a message in a shell without a terminal. An HTTP proxy
// answers every download with a body.
func mend(t *testing.T, dir string, message error, body []byte) {
	t.Helper()
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.String() != issuerURL {
			t.Errorf("the command asks for %s, want %s", r.URL, issuerURL)
		}
		_, _ = w.Write(body)
	}))
	defer proxy.Close()
	for _, found := range commands.FindAllStringSubmatch(message.Error(), -1) {
		for _, program := range []string{"openssl", "curl", "awk"} {
			if _, err := exec.LookPath(program); err != nil && strings.Contains(found[1], program) {
				t.Skipf("%s is not installed", program)
			}
		}
		run := exec.CommandContext(t.Context(), "sh", "-c", found[1])
		run.Dir, run.Stdin = dir, strings.NewReader("secret\n")
		run.Env = append(os.Environ(), "http_proxy="+proxy.URL)
		run.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if out, err := run.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", found[1], err, out)
		}
	}
}

const issuerURL = "http://ca.example.com/intermediate.cer"

func withURL(urls ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.IssuingCertificateURL = urls }
}

// manualFile is a row of TestManualFiles. CRT and KEY stand for the paths of the
// two files.
type manualFile struct {
	name      string
	cert, key []byte
	names     []string // relayName if empty
	want      string   // the whole error; empty for none
	mends     bool     // the commands in the error make the files good
	pin       bool
	sent      []*tls.Certificate // what clients get; not compared if empty
	log       string             // a part of the log at the start; "-" for no log
}

// date is the date of a time in messages.
func date(t time.Time) string { return t.UTC().Format(time.DateOnly) }

func manualFiles(t *testing.T, p pki) []manualFile {
	t.Helper()
	key := p.key
	keys := make(map[string][]byte) // of chains; for the rows without a key
	chain := func(list ...*tls.Certificate) []byte {
		text := testkit.ChainPEM(list...)
		keys[string(text)] = testkit.KeyPEM(t, list[0])
		return text
	}
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	ago, ahead := time.Now().Add(-49*time.Hour), time.Now().Add(49*time.Hour)
	public := server(t, p.middle, withURL(issuerURL))
	publicKey := testkit.KeyPEM(t, public)
	oldMiddle := authority(t, "Test Intermediate", p.root, func(c *x509.Certificate) { c.NotBefore, c.NotAfter = ago.Add(-time.Hour), ago })
	underOld := server(t, oldMiddle, nil)
	earlyMiddle := authority(t, "Test Intermediate", p.root, func(c *x509.Certificate) { c.NotBefore, c.NotAfter = ahead, ahead.Add(time.Hour) })
	underEarly := server(t, earlyMiddle, nil)
	namesake := authority(t, "Test Intermediate", p.root, nil)
	renewed := server(t, p.middle, nil)
	self := testkit.SelfSigned(t, relayName)
	replaced := testkit.NewCertificate(t, testkit.Certificate{Names: []string{relayName}, Key: self.PrivateKey.(crypto.Signer)})
	other := testkit.SelfSigned(t, "other.example.com")
	byRoot := server(t, p.root, nil)
	rootWithURL := authority(t, "Root with URL", nil, withURL(issuerURL))
	byRootWithURL := server(t, rootWithURL, withURL(issuerURL))
	noSAN := func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = nil, nil }
	cnSelf, cnSigned := server(t, nil, noSAN), server(t, p.middle, noSAN)
	wildcard := server(t, p.middle, func(c *x509.Certificate) { c.DNSNames = []string{"*.example.com"} })
	addressAsName := server(t, p.middle, func(c *x509.Certificate) { c.DNSNames = []string{"203.0.113.7"} })
	client := server(t, p.root, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} })
	expired := server(t, p.middle, func(c *x509.Certificate) { c.NotBefore, c.NotAfter = ago.Add(-time.Hour), ago })
	early := server(t, p.middle, func(c *x509.Certificate) { c.NotBefore, c.NotAfter = ahead, ahead.Add(time.Hour) })
	notCA := server(t, p.root, func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: "no authority"} })
	underNotCA := server(t, notCA, nil)
	limited := authority(t, "Limited", p.root, func(c *x509.Certificate) {
		c.PermittedDNSDomainsCritical, c.PermittedDNSDomains = true, []string{"example.org"}
	})
	underLimited := server(t, limited, nil)
	sameName := authority(t, relayName, nil, nil) // a tutorial's authority, named like its server
	underSameName := server(t, sameName, nil)
	half := chain(p.middle)[:200]
	ec, _ := x509.MarshalECPrivateKey(p.leaf.PrivateKey.(*ecdsa.PrivateKey))
	traditional := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: ec})
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	pkcs1 := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(rsaKey)})
	pkcs8 := func(key any) []byte {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("GODEBUG", "rsa1024min=0")
	short, err := rsa.GenerateKey(rand.Reader, 512)
	if err != nil {
		t.Fatal(err)
	}
	ed448, err := asn1.Marshal(struct {
		Version   int
		Algorithm pkix.AlgorithmIdentifier
		Key       []byte
	}{Algorithm: pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 3, 101, 113}}, Key: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	exchange, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	x25519, err := x509.MarshalPKCS8PrivateKey(exchange)
	if err != nil {
		t.Fatal(err)
	}
	fingerprint := func(c *tls.Certificate) string {
		der, err := x509.MarshalPKIXPublicKey(c.Leaf.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
		return hex.EncodeToString(sum[:8]) + "…"
	}
	const needsRoot, silent = `"level":"warn","authority":"CN=Test Root","message":"clients need the certificate of this authority installed; this machine does not trust it"`, "-"
	rows := []manualFile{
		// Served.
		{name: "full chain", cert: chain(p.leaf, p.middle, p.root), key: key, sent: []*tls.Certificate{p.leaf, p.middle, p.root}, log: needsRoot},
		{name: "chain without its root", cert: chain(p.leaf, p.middle), key: key, sent: []*tls.Certificate{p.leaf, p.middle}, log: needsRoot},
		{name: "leaf of a private authority alone", cert: chain(byRoot), key: testkit.KeyPEM(t, byRoot), sent: []*tls.Certificate{byRoot}, log: needsRoot},
		{name: "leaf of a private intermediate alone", cert: chain(p.leaf), key: key, sent: []*tls.Certificate{p.leaf}, log: `"authority":"CN=Test Intermediate"`},
		{name: "issuers in the wrong order", cert: chain(p.leaf, p.root, p.middle), key: key, sent: []*tls.Certificate{p.leaf, p.middle, p.root}, log: needsRoot},
		{name: "unrelated certificates in between", cert: chain(p.leaf, other, p.middle, other), key: key, sent: []*tls.Certificate{p.leaf, p.middle}, log: `"blocks":["block 2: CN=other.example.com, not an issuer of the leaf","block 4: CN=other.example.com, not an issuer of the leaf"]`},
		{name: "copies", cert: chain(p.leaf, p.leaf, p.middle, p.middle), key: key, sent: []*tls.Certificate{p.leaf, p.middle}, log: `"blocks":["block 2: a copy of block 1","block 4: a copy of block 3"]`},
		{name: "an older issuer of the same name beside the right one", cert: chain(p.leaf, namesake, p.middle), key: key, sent: []*tls.Certificate{p.leaf, p.middle}, log: needsRoot},
		{name: "self-signed", cert: chain(self), key: testkit.KeyPEM(t, self), pin: true, sent: []*tls.Certificate{self}, log: silent},
		{name: "self-signed with copies", cert: chain(self, self, self), key: testkit.KeyPEM(t, self), pin: true, sent: []*tls.Certificate{self}, log: `"block 3: a copy of block 1"`},
		{name: "self-signed beside another", cert: chain(self, other), key: testkit.KeyPEM(t, self), pin: true, sent: []*tls.Certificate{self}, log: "not an issuer of the leaf"},
		{name: "self-signed before the one that it replaces", cert: chain(self, replaced), key: testkit.KeyPEM(t, self), pin: true, sent: []*tls.Certificate{self}, log: "not an issuer of the leaf"},
		{name: "authority named like its server", cert: chain(underSameName, sameName), key: testkit.KeyPEM(t, underSameName), sent: []*tls.Certificate{underSameName, sameName}, log: `"authority":"CN=derp.example.com"`},
		{name: "Windows line ends", cert: bytes.ReplaceAll(chain(p.leaf, p.middle), []byte("\n"), []byte("\r\n")), key: bytes.ReplaceAll(key, []byte("\n"), []byte("\r\n")), log: needsRoot},
		{name: "key and chain in both files", cert: join(key, chain(p.leaf, p.middle)), key: join(key, chain(p.leaf, p.middle)), sent: []*tls.Certificate{p.leaf, p.middle}},
		{name: "EC PARAMETERS before the key", cert: chain(p.leaf, p.middle), key: join([]byte("-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"), traditional)},
		{name: "an old key before the new one", cert: chain(p.leaf, p.middle), key: join(testkit.KeyPEM(t, renewed), key)},
		{name: "damaged block after a private leaf", cert: join(chain(byRoot), half), key: testkit.KeyPEM(t, byRoot), sent: []*tls.Certificate{byRoot}, log: "its line -----END CERTIFICATE----- is missing"},
		{name: "AD CS: where the issuer is in LDAP", cert: chain(server(t, p.middle, withURL("ldap:///CN=CA,CN=AIA", issuerURL))), log: `"authority":"CN=Test Intermediate"`},
		{name: "issuer at a private name", cert: chain(server(t, p.middle, withURL("http://pki.corp.internal/ca.cer"))), log: `"authority":"CN=Test Intermediate"`},
		{name: "issuer at an address", cert: chain(server(t, p.middle, withURL("http://10.0.0.1/ca.cer"))), log: `"authority":"CN=Test Intermediate"`},
		{name: "issuer at https", cert: chain(server(t, p.middle, withURL("https://vault.example.com/v1/pki/ca"))), log: `"authority":"CN=Test Intermediate"`},
		{name: "root that says where it is", cert: chain(byRootWithURL, rootWithURL), log: `"authority":"CN=Root with URL"`},
		{name: "issuer at a port", cert: chain(server(t, p.middle, withURL("http://vault.example.com:8200/v1/pki/ca"))), log: `"authority":"CN=Test Intermediate"`},

		// The leaf.
		{
			name: "issuer before the leaf", cert: chain(p.middle, p.leaf), key: key, mends: true,
			want: "block 2 of CRT is the leaf's; put it first, before CN=Test Intermediate: `(awk '/-BEGIN /{n++} n==2' CRT; awk '/-BEGIN /{n++} n!=2' CRT) > CRT.new && cp CRT.new CRT && rm CRT.new`",
		},
		{
			name: "leaf last", cert: chain(p.root, p.middle, p.leaf), key: key, mends: true,
			want: "block 3 of CRT is the leaf's; put it first, before CN=Test Root: `(awk '/-BEGIN /{n++} n==3' CRT; awk '/-BEGIN /{n++} n!=3' CRT) > CRT.new && cp CRT.new CRT && rm CRT.new`",
		},
		{
			name: "two blocks on a line", cert: join(bytes.TrimSpace(chain(p.leaf)), chain(p.middle)), key: key, mends: true,
			want: "block 2 of CRT begins on line N, where the block before it ends; run `sed -i 's/----------BEGIN /-----\\n-----BEGIN /g' CRT`",
		},
		{name: "expired", cert: chain(expired, p.middle), want: "CRT expired on " + date(ago) + "; renew it"},
		{name: "not yet valid", cert: chain(early, p.middle), want: "CRT is not valid before " + ahead.UTC().Format("2006-01-02 15:04 UTC") + "; check the clock of this machine, which is at NOW"},
		{name: "for clients", cert: chain(client), want: "CRT is not for servers: its extended key usage, or that of an issuer, lacks serverAuth; get a certificate of a server"},
		{name: "damaged leaf", cert: join(chain(p.leaf)[:200], []byte("\n"), chain(p.middle)), key: key, want: "block 1 of CRT (line N) is damaged: its line -----END CERTIFICATE----- is missing; copy the file again"},

		// Names.
		{name: "another name", cert: chain(p.leaf, p.middle), key: key, names: []string{relayName, "b.example.com"}, want: "CRT covers derp.example.com, not b.example.com; get a certificate for every name in DERP_DOMAIN"},
		{
			name: "common name alone, self-signed", cert: chain(cnSelf), key: testkit.KeyPEM(t, cnSelf), mends: true, pin: true,
			want: "CRT names derp.example.com in its common name alone, which clients ignore; make it again with a subject alternative name: `openssl req -x509 -days 3650 -out CRT -key KEY -subj /CN=derp.example.com -addext subjectAltName=DNS:derp.example.com`",
		},
		{
			name: "common name alone, signed", cert: chain(cnSigned, p.middle), names: []string{relayName, "203.0.113.7"},
			want: "CRT names derp.example.com in its common name alone, which clients ignore; make it again with a subject alternative name: `openssl req -new -out CRT.csr -key KEY -subj /CN=derp.example.com -addext subjectAltName=DNS:derp.example.com,IP:203.0.113.7`",
		},
		{name: "address as a DNS name", cert: chain(addressAsName), names: []string{"203.0.113.7"}, want: "CRT has the address 203.0.113.7 as a DNS name, which clients ignore; make it again with subjectAltName=IP:203.0.113.7"},
		{name: "wildcard and two labels", cert: chain(wildcard, p.middle), names: []string{"a.derp.example.com"}, want: "CRT covers *.example.com, not a.derp.example.com: a wildcard stands for exactly one label; get a certificate for a.derp.example.com"},
		{name: "wildcard and its zone", cert: chain(wildcard, p.middle), names: []string{"example.com"}, want: "CRT covers *.example.com, not example.com: a wildcard stands for exactly one label; get a certificate for example.com"},
		{name: "wildcard that matches", cert: chain(wildcard, p.middle)},

		// The chain.
		{
			name: "missing intermediate", cert: chain(public), key: publicKey, mends: true,
			want: "CRT: the chain is incomplete: the certificate of \"CN=Test Intermediate\", which signed CN=derp.example.com, is missing; append it to the file: `(echo; curl -sL " + issuerURL + " | openssl x509 -inform DER) >> CRT`",
		},
		{
			name: "missing intermediate, and no newline at the end", cert: bytes.TrimSpace(chain(public)), key: publicKey, mends: true,
			want: "CRT: the chain is incomplete: the certificate of \"CN=Test Intermediate\", which signed CN=derp.example.com, is missing; append it to the file: `(echo; curl -sL " + issuerURL + " | openssl x509 -inform DER) >> CRT`",
		},
		{
			name: "missing intermediate, in PKCS7", cert: chain(server(t, p.middle, withURL("http://ca.example.com/x.p7c"))),
			want: "CRT: the chain is incomplete: the certificate of \"CN=Test Intermediate\", which signed CN=derp.example.com, is missing; append it to the file: `(echo; curl -sL http://ca.example.com/x.p7c | openssl pkcs7 -inform DER -print_certs) >> CRT`",
		},
		{
			name: "unrelated in place of the intermediate", cert: chain(public, other), key: publicKey, mends: true,
			want: "CRT: the chain is incomplete: the certificate of \"CN=Test Intermediate\", which signed CN=derp.example.com, is missing; append it to the file: `(echo; curl -sL " + issuerURL + " | openssl x509 -inform DER) >> CRT`",
		},
		{
			name: "another issuer of the same name", cert: chain(public, namesake), key: publicKey, mends: true,
			want: "block 2 of CRT has the name of the issuer (CN=Test Intermediate), but another key: it did not sign CN=derp.example.com; append the right one: `(echo; curl -sL " + issuerURL + " | openssl x509 -inform DER) >> CRT`",
		},
		{name: "damaged intermediate", cert: join(chain(public), half), key: publicKey, want: "block 2 of CRT (line N) is damaged: its line -----END CERTIFICATE----- is missing; copy the file again"},
		{name: "expired intermediate", cert: chain(underOld, oldMiddle), want: "block 2 of CRT (CN=Test Intermediate), which signed the certificate or its issuer, expired on " + date(ago) + "; put the authority's present one in its place"},
		{name: "intermediate not yet valid", cert: chain(underEarly, earlyMiddle), want: "block 2 of CRT (CN=Test Intermediate), which signed the certificate or its issuer, is not valid before " + ahead.UTC().Format("2006-01-02 15:04 UTC") + "; check the clock of this machine, which is at NOW"},
		{name: "issuer that is no authority", cert: chain(underNotCA, notCA), want: "block 2 of CRT (CN=no authority), which signed the certificate or its issuer, is not the certificate of an authority (basicConstraints CA:TRUE); have the certificate signed by one"},
		{name: "issuer for other names", cert: chain(underLimited, limited), want: "CRT: every client refuses the chain: x509: a root or intermediate certificate is not authorized to sign for this name: DNS name \"derp.example.com\" is not permitted by any constraint; get the certificate and its chain again"},

		// The key.
		{name: "swapped", cert: key, key: chain(p.leaf, p.middle), want: "CRT has the private key, and KEY the certificate; swap the two files"},
		{name: "key in both files", cert: key, key: key, want: "CRT has a private key, and no certificate; put the certificate there"},
		{name: "certificate in both files", cert: chain(p.leaf, p.middle), key: chain(p.leaf, p.middle), want: "KEY has a certificate, and no private key; put the private key there"},
		{name: "key in the file of the certificate alone", cert: join(key, chain(p.leaf, p.middle)), key: chain(p.leaf, p.middle), want: "KEY has no private key, but CRT has one; name that file for the key too"},
		{
			name: "another key of the same kind", cert: chain(renewed, p.middle), key: key,
			want: "KEY does not belong to CRT: its public key is " + fingerprint(p.leaf) + ", and that of the certificate is " + fingerprint(renewed) + "; copy both from the same renewal (derpd reads both again when the other one changes)",
		},
		{name: "another kind of key", cert: chain(p.leaf, p.middle), key: pkcs1, want: "KEY is an RSA key, but the certificate in CRT is for an ECDSA key; put the key there with which the certificate was requested"},
		{name: "key of the authority", cert: chain(p.leaf, p.middle), key: testkit.KeyPEM(t, p.middle), want: "KEY is the key of the authority CN=Test Intermediate (block 2 of CRT), not of the first certificate; put the key of CN=derp.example.com there"},
		{name: "key that cannot sign", cert: chain(p.leaf), key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: x25519}), want: "block 1 of KEY is a key that clients cannot use (*ecdh.PrivateKey); make the key and the certificate again, with an RSA key of 2048 bits or an ECDSA key with P-256"},
		{name: "key of a curve that TLS lacks", cert: chain(p.leaf), key: pkcs8(p224), want: "block 1 of KEY is a key that clients cannot use (ECDSA with P-224); make the key and the certificate again, with an RSA key of 2048 bits or an ECDSA key with P-256"},
		{name: "short key", cert: chain(p.leaf), key: pkcs8(short), want: "block 1 of KEY is a key that clients cannot use (RSA with 512 bits); make the key and the certificate again, with an RSA key of 2048 bits or an ECDSA key with P-256"},
		{name: "key that Go lacks", cert: chain(p.leaf), key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: ed448}), want: "block 1 of KEY (line N) is a key that clients cannot use: x509: PKCS#8 wrapping contained private key with unknown algorithm: 1.3.101.113; make the key and the certificate again, with an RSA key of 2048 bits or an ECDSA key with P-256"},
		{name: "half a key", cert: chain(p.leaf), key: key[:100], want: "block 1 of KEY (line N) is damaged: its line -----END PRIVATE KEY----- is missing; copy the file again"},
		{name: "nonsense as a key", cert: chain(p.leaf), key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}), want: "block 1 of KEY (line N) is not a private key that can be read; copy the file again"},
		{name: "no key", cert: chain(p.leaf), key: []byte("\n"), want: "KEY is empty; write the file again"},
		{name: "public key", cert: chain(p.leaf), key: pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: []byte("x")}), want: "KEY is the public key; put the private key there"},
		{name: "parameters alone", cert: chain(p.leaf), key: pem.EncodeToMemory(&pem.Block{Type: "EC PARAMETERS", Bytes: []byte("x")}), want: "KEY has no private key, and begins with EC PARAMETERS; put the private key there"},
		{name: "OpenSSH", cert: chain(p.leaf), key: pem.EncodeToMemory(&pem.Block{Type: "OPENSSH PRIVATE KEY", Bytes: []byte("x")}), want: "KEY is a key in the form of OpenSSH; bring the key with which the certificate was requested, as PEM"},

		// Other files in place of the certificate.
		{name: "byte order mark", cert: join([]byte("\xef\xbb\xbf"), chain(p.leaf, p.middle)), key: key, mends: true, want: "CRT has a byte order mark; run `LC_ALL=C sed -i 's/\\xef\\xbb\\xbf//g' CRT`"},
		{name: "DER", cert: byRoot.Certificate[0], key: testkit.KeyPEM(t, byRoot), mends: true, want: "CRT is a certificate in DER form; run `openssl x509 -inform DER -in CRT -out CRT.new && cp CRT.new CRT && rm CRT.new`"},
		{name: "page", cert: []byte("<html>"), key: key, want: "CRT is an HTML page, perhaps of a login; download the file itself"},
		{name: "request", cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte("x")}), key: key, want: "CRT is a certificate request; send it to an authority, and use the certificate that comes back"},
		{name: "revocation list", cert: pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: []byte("x")}), key: key, want: "CRT has no certificate, and begins with X509 CRL; put the certificate there"},
	}
	for i, row := range rows {
		if row.key == nil {
			rows[i].key = keys[string(row.cert)]
		}
	}
	return rows
}

// TestManualFiles asserts for each kind of file what derpd says, and that the
// commands in its message work.
func TestManualFiles(t *testing.T) {
	p := newPKI(t)
	for _, tt := range manualFiles(t, p) {
		t.Run(tt.name, func(t *testing.T) { testManualFile(t, p, tt) })
	}
}

func testManualFile(t *testing.T, p pki, tt manualFile) {
	t.Helper()
	dir := t.TempDir()
	if tt.names == nil {
		tt.names = []string{relayName}
	}
	c := certs.ManualConfig{CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key"), Names: tt.names, Roots: testkit.Pool(testkit.NewAuthority(t))}
	write(t, c.CertFile, tt.cert)
	write(t, c.KeyFile, tt.key)
	var log bytes.Buffer
	c.Log = zerolog.New(&log)
	m, err := certs.LoadManual(c)
	got := ""
	if err != nil {
		got = regexp.MustCompile(`line [0-9]+`).ReplaceAllString(err.Error(), "line N")
		got = regexp.MustCompile(`which is at .*`).ReplaceAllString(strings.NewReplacer(c.CertFile, "CRT", c.KeyFile, "KEY").Replace(got), "which is at NOW")
	}
	if got != tt.want {
		t.Fatalf("got  %s\nwant %s", got, tt.want)
	}
	if err != nil && tt.mends {
		before, _ := os.Stat(c.KeyFile)
		mend(t, dir, err, p.middle.Certificate[0])
		if m, err = certs.LoadManual(c); err != nil {
			t.Fatalf("after the command: %v", err)
		}
		if after, err := os.Stat(c.KeyFile); err != nil || after.Mode() != before.Mode() {
			t.Errorf("the command changes the mode of the key: %v, %v", after, err)
		}
	}
	if err != nil {
		return
	}
	if got := m.Status().Pin != ""; got != tt.pin {
		t.Errorf("pin %q, want one: %t", m.Status().Pin, tt.pin)
	}
	if tt.want != "" {
		return
	}
	served, err := m.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	same := func(der []byte, c *tls.Certificate) bool { return bytes.Equal(der, c.Certificate[0]) }
	if tt.sent != nil && !slices.EqualFunc(served.Certificate, tt.sent, same) {
		t.Errorf("clients get %d certificates in another order or number, want %d", len(served.Certificate), len(tt.sent))
	}
	if tt.log == "-" && log.Len() > 0 || tt.log != "-" && !strings.Contains(log.String(), tt.log) {
		t.Errorf("logged %s\nwant %q in it", log.String(), tt.log)
	}
}

// A chain that ends at a root of this machine is served without a remark, whatever
// else is in the file.
func TestManualTrusted(t *testing.T) {
	p := newPKI(t)
	past := time.Now().Add(-time.Hour)
	crossed := testkit.NewCertificate(t, testkit.Certificate{Names: []string{"Test Root"}, CA: true, Issuer: authority(t, "Older Root", nil, nil), Change: func(c *x509.Certificate) { c.NotBefore, c.NotAfter = past.Add(-time.Hour), past }})
	for name, chain := range map[string][]*tls.Certificate{
		"complete":             {p.leaf, p.middle},
		"with the root":        {p.leaf, p.middle, p.root},
		"wrong order":          {p.leaf, p.root, p.middle},
		"expired cross-signed": {p.leaf, p.middle, crossed},
	} {
		dir := t.TempDir()
		var log bytes.Buffer
		c := certs.ManualConfig{
			CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key"),
			Names: []string{relayName}, Roots: testkit.Pool(p.root), Log: zerolog.New(&log),
		}
		testkit.WritePair(t, c.CertFile, c.KeyFile, chain...)
		if m, err := certs.LoadManual(c); err != nil || m.Status().Pin != "" || strings.Contains(log.String(), "authority") {
			t.Errorf("%s: %v, logged %s", name, err, log.String())
		}
	}
}

// A machine without any roots cannot tell that an intermediate is missing.
func TestManualWithoutRoots(t *testing.T) {
	p := newPKI(t)
	dir := t.TempDir()
	var log bytes.Buffer
	c := certs.ManualConfig{
		CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key"),
		Names: []string{relayName}, Roots: x509.NewCertPool(), Log: zerolog.New(&log),
	}
	testkit.WritePair(t, c.CertFile, c.KeyFile, server(t, p.middle, withURL(issuerURL)))
	if _, err := certs.LoadManual(c); err != nil || !strings.Contains(log.String(), `"authority":"CN=Test Intermediate"`) {
		t.Errorf("%v, logged %s", err, log.String())
	}
}

// An issuer among the private roots is not missing, but clients need it.
func TestManualWithPrivateRoots(t *testing.T) {
	p := newPKI(t)
	dir := t.TempDir()
	var log bytes.Buffer
	c := certs.ManualConfig{
		CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key"),
		Names: []string{relayName}, Roots: testkit.Pool(authority(t, "Other Root", nil, nil)), Private: testkit.Pool(p.middle), Log: zerolog.New(&log),
	}
	testkit.WritePair(t, c.CertFile, c.KeyFile, server(t, p.middle, withURL(issuerURL)))
	if _, err := certs.LoadManual(c); err != nil || !strings.Contains(log.String(), `"authority":"CN=Test Intermediate"`) {
		t.Errorf("%v, logged %s", err, log.String())
	}
	c.Private = testkit.Pool(p.root)
	if _, err := certs.LoadManual(c); err == nil || !strings.Contains(err.Error(), "is missing") {
		t.Errorf("the root alone does not complete the chain: %v", err)
	}
}

// derper refuses a pair that does not load, and a certificate without its host name
// (cmd/derper/cert.go). A client with the authority's root refuses what
// derper serves and derpd refuses.
func TestManualServesWhatDerperServes(t *testing.T) {
	p := newPKI(t)
	compared := 0
	for _, tt := range manualFiles(t, p) {
		names := tt.names
		if names == nil {
			names = []string{relayName}
		}
		served, err := tls.X509KeyPair(tt.cert, tt.key)
		if err != nil || served.Leaf.VerifyHostname(names[0]) != nil || tt.want == "" {
			continue
		}
		intermediates := x509.NewCertPool()
		for _, der := range served.Certificate[1:] {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			intermediates.AddCert(c)
		}
		refused := false
		for _, name := range names {
			_, err := served.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: testkit.Pool(p.root), Intermediates: intermediates})
			refused = refused || err != nil
		}
		if !refused {
			t.Errorf("%s: derper serves it and clients accept it, but derpd says %s", tt.name, tt.want)
		}
		compared++
	}
	if compared < 8 {
		t.Errorf("%d rows that derper serves and derpd refuses, want more", compared)
	}
}

// Files of the real openssl have their messages, and its commands make them good.
func TestManualOpenSSL(t *testing.T) {
	p := newPKI(t)
	chain, key := testkit.ChainPEM(p.leaf, p.middle, p.root), p.key
	dir := t.TempDir()
	rsaKey := openssl(t, nil, "genrsa", "-traditional", "2048")
	write(t, filepath.Join(dir, "rsa.key"), rsaKey)
	self := func(args ...string) []byte {
		return openssl(t, nil, append([]string{"req", "-x509", "-key", filepath.Join(dir, "rsa.key"), "-days", "30", "-subj", "/CN=" + relayName}, args...)...)
	}
	const alternative = "subjectAltName=DNS:" + relayName
	good := self("-addext", alternative)
	request := openssl(t, nil, "req", "-new", "-key", filepath.Join(dir, "rsa.key"), "-subj", "/CN="+relayName)
	write(t, filepath.Join(dir, "request.csr"), request)
	write(t, filepath.Join(dir, "extensions"), []byte(alternative))
	write(t, filepath.Join(dir, "root.crt"), testkit.ChainPEM(p.root))
	write(t, filepath.Join(dir, "root.key"), testkit.KeyPEM(t, p.root))
	sha1 := openssl(t, nil, "x509", "-req", "-sha1", "-in", filepath.Join(dir, "request.csr"), "-extfile", filepath.Join(dir, "extensions"),
		"-CA", filepath.Join(dir, "root.crt"), "-CAkey", filepath.Join(dir, "root.key"), "-CAcreateserial", "-days", "1")
	const newKey = "`openssl pkey -in KEY -out KEY.new && cp KEY.new KEY && rm KEY.new`"
	for _, tt := range []manualFile{
		{name: "RSA key", cert: good, key: rsaKey, pin: true, log: "-"},
		{name: "PKCS8 passphrase", cert: chain, key: openssl(t, key, "pkey", "-aes256", "-passout", "pass:secret"), mends: true, want: "KEY has a passphrase; remove it with " + newKey},
		{name: "traditional passphrase", cert: good, key: openssl(t, rsaKey, "rsa", "-traditional", "-aes128", "-passout", "pass:secret"), mends: true, pin: true, want: "KEY has a passphrase; remove it with " + newKey},
		{name: "traditional EC passphrase", cert: chain, key: openssl(t, key, "ec", "-aes128", "-passout", "pass:secret"), mends: true, want: "KEY has a passphrase; remove it with " + newKey},
		{name: "key as DER", cert: chain, key: openssl(t, key, "pkey", "-outform", "DER"), mends: true, want: "KEY is a private key in DER form; run `openssl pkey -inform DER -in KEY -out KEY.new && cp KEY.new KEY && rm KEY.new`"},
		{name: "common name alone", cert: self(), key: rsaKey, mends: true, pin: true, want: "CRT names derp.example.com in its common name alone, which clients ignore; make it again with a subject alternative name: `openssl req -x509 -days 3650 -out CRT -key KEY -subj /CN=derp.example.com -addext subjectAltName=DNS:derp.example.com`"},
		{name: "PKCS7", cert: openssl(t, testkit.ChainPEM(p.leaf), "crl2pkcs7", "-nocrl", "-certfile", "/dev/stdin"), key: key, mends: true, want: "CRT is PKCS#7; run `openssl pkcs7 -print_certs -in CRT -out CRT.new && cp CRT.new CRT && rm CRT.new`"},
		{name: "trusted certificate", cert: openssl(t, good, "x509", "-trustout"), key: rsaKey, mends: true, pin: true, want: "CRT has a TRUSTED CERTIFICATE; run `openssl x509 -in CRT -out CRT.new && cp CRT.new CRT && rm CRT.new`"},
		{name: "request", cert: request, key: rsaKey, want: "CRT is a certificate request; send it to an authority, and use the certificate that comes back"},
		{name: "public key", cert: good, key: openssl(t, rsaKey, "rsa", "-pubout"), want: "KEY is the public key; put the private key there"},
		{name: "with its text", cert: openssl(t, good, "x509", "-text"), key: rsaKey, pin: true, log: "-"},
		{name: "SHA-1", cert: sha1, key: rsaKey, want: "block 1 of CRT (CN=derp.example.com) is signed with ECDSA-SHA1, which clients refuse; have it signed with SHA-256"},
	} {
		t.Run(tt.name, func(t *testing.T) { testManualFile(t, p, tt) })
	}
}

// The fingerprints in a message are those that openssl prints.
func TestManualFingerprints(t *testing.T) {
	dir := t.TempDir()
	c := certs.ManualConfig{CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key"), Names: []string{relayName}}
	one, other := testkit.SelfSigned(t, relayName), testkit.SelfSigned(t, relayName)
	write(t, c.CertFile, testkit.ChainPEM(one))
	write(t, c.KeyFile, testkit.KeyPEM(t, other))
	_, err := certs.LoadManual(c)
	if err == nil {
		t.Fatal("the pair was loaded")
	}
	for words, public := range map[string][]byte{
		"its public key is ":          openssl(t, nil, "pkey", "-in", c.KeyFile, "-pubout"),
		"that of the certificate is ": openssl(t, nil, "x509", "-in", c.CertFile, "-noout", "-pubkey"),
	} {
		sum := strings.Fields(string(openssl(t, public, "sha256")))
		if want := words + sum[len(sum)-1][:16] + "…"; !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}
