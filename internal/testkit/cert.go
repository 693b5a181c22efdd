package testkit

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Certificate describes a certificate for [NewCertificate]. The zero value with
// Names is a self-signed server certificate that is valid now.
type Certificate struct {
	// Names are DNS names and IP addresses. The first one is the common name. An
	// authority's certificate has only a common name.
	Names []string

	// NotBefore and NotAfter default to an hour ago and to a day from now.
	NotBefore, NotAfter time.Time

	// CA makes the certificate of an authority.
	CA bool

	// Key is the key of the certificate; nil for a new one.
	Key crypto.Signer

	// Change changes the certificate before it is signed; nil for no change.
	Change func(*x509.Certificate)

	// Issuer signs the certificate; nil for a self-signed one.
	Issuer *tls.Certificate
}

// NewCertificate creates a certificate with a new P-256 key. Leaf is set.
func NewCertificate(t testing.TB, c Certificate) *tls.Certificate {
	t.Helper()
	made, err := c.make()
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func (c Certificate) make() (*tls.Certificate, error) {
	private := c.Key
	if private == nil {
		made, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		private = made
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: c.Names[0]}, BasicConstraintsValid: true,
		NotBefore: c.NotBefore, NotAfter: c.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if c.NotBefore.IsZero() {
		template.NotBefore = time.Now().Add(-time.Hour)
	}
	if c.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(24 * time.Hour)
	}
	if c.CA {
		template.IsCA, template.KeyUsage, template.ExtKeyUsage = true, x509.KeyUsageCertSign, nil
	} else {
		for _, name := range c.Names {
			if ip := net.ParseIP(name); ip != nil {
				template.IPAddresses = append(template.IPAddresses, ip)
			} else {
				template.DNSNames = append(template.DNSNames, name)
			}
		}
	}
	if c.Change != nil {
		c.Change(template)
	}
	parent, signer := template, any(private)
	if c.Issuer != nil {
		parent, signer = c.Issuer.Leaf, c.Issuer.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, private.Public(), signer)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private, Leaf: leaf}, nil
}

// PublicAuthority creates an authority and makes it the only system root of this
// process and of the programs that it starts. TestMain calls it, because crypto/x509
// reads the system's roots once. remove removes the files.
func PublicAuthority() (root *tls.Certificate, remove func(), err error) {
	root, err = Certificate{Names: []string{"Public Root"}, CA: true, NotAfter: time.Now().AddDate(20, 0, 0)}.make()
	if err != nil {
		return nil, nil, err
	}
	dir, err := os.MkdirTemp("", "roots")
	if err != nil {
		return nil, nil, err
	}
	file := filepath.Join(dir, "roots.pem")
	err = cmp.Or(
		os.WriteFile(file, ChainPEM(root), 0o600),
		os.Mkdir(filepath.Join(dir, "none"), 0o700),
		os.Setenv("SSL_CERT_FILE", file),
		os.Setenv("SSL_CERT_DIR", filepath.Join(dir, "none")),
	)
	return root, func() { _ = os.RemoveAll(dir) }, err
}

// SelfSigned makes a self-signed certificate for names and addresses.
func SelfSigned(t testing.TB, names ...string) *tls.Certificate {
	t.Helper()
	return NewCertificate(t, Certificate{Names: names})
}

// NewAuthority makes the certificate of an authority, for Issuer of
// [Certificate].
func NewAuthority(t testing.TB) *tls.Certificate {
	t.Helper()
	return NewCertificate(t, Certificate{Names: []string{"Test Root"}, CA: true})
}

// Pool is the pool of the given roots.
func Pool(roots ...*tls.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, root := range roots {
		pool.AddCert(root.Leaf)
	}
	return pool
}

// Trust is the configuration of a TLS client that trusts the roots in a pool.
func Trust(pool *x509.CertPool) *tls.Config {
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
}

// Hash is the SHA-256 of a certificate in hexadecimal, as in a CertName after
// "sha256-raw:".
func Hash(c *x509.Certificate) string {
	return fmt.Sprintf("%x", sha256.Sum256(c.Raw))
}

// ChainPEM encodes certificates, the server's own first.
func ChainPEM(chain ...*tls.Certificate) []byte {
	var out bytes.Buffer
	for _, c := range chain {
		out.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}))
	}
	return out.Bytes()
}

// KeyPEM encodes the private key of a certificate.
func KeyPEM(t testing.TB, c *tls.Certificate) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// WritePair writes a chain and the private key of its first certificate to two
// files.
func WritePair(t testing.TB, certFile, keyFile string, chain ...*tls.Certificate) {
	t.Helper()
	err := cmp.Or(os.WriteFile(keyFile, KeyPEM(t, chain[0]), 0o600), os.WriteFile(certFile, ChainPEM(chain...), 0o600))
	if err != nil {
		t.Fatal(err)
	}
}
