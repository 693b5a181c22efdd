package certs

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"

	"derpd/internal/filekind"
)

// pair is the content of a certificate file and of its key file.
type pair struct {
	leaf    certificate   // the first certificate
	key     crypto.Signer // of the leaf
	all     []certificate // in the order of the file, the leaf first
	damaged []error       // certificates that cannot be read
}

// certificate is a certificate and its place in the file.
type certificate struct {
	*x509.Certificate
	block filekind.Block
}

// read reads both files. The key must belong to the first certificate.
func (c ManualConfig) read() (*pair, error) {
	certData, err := filekind.Read(c.CertFile)
	if err != nil {
		return nil, err
	}
	keyData, err := filekind.Read(c.KeyFile)
	if err != nil {
		return nil, err
	}
	certBlocks, err := filekind.Blocks(c.CertFile, certData)
	if err != nil {
		return nil, err
	}
	keyBlocks, err := filekind.Blocks(c.KeyFile, keyData)
	if err != nil {
		return nil, err
	}
	p := new(pair)
	for _, b := range certBlocks {
		if b.Label != "CERTIFICATE" {
			continue
		}
		parsed, err := b.Certificate()
		switch {
		case err == nil:
			p.all = append(p.all, certificate{parsed, b})
		case len(p.all) == 0:
			return nil, err // without the leaf, nothing else matters
		default:
			p.damaged = append(p.damaged, err)
		}
	}
	if len(p.all) == 0 {
		return nil, c.explainNoCertificate(certBlocks, keyBlocks)
	}
	keys, err := readKeys(keyBlocks)
	switch {
	case err != nil:
		return nil, err
	case len(keys) == 0:
		return nil, c.explainNoKey(certBlocks, keyBlocks)
	}
	p.leaf = p.all[0]
	for _, key := range keys {
		if belongs(key, p.leaf) {
			p.key = key
			return p, nil
		}
	}
	return nil, c.explainMismatch(p.all, keys)
}

// readKeys returns the private keys of a file. The error is about the first key that
// cannot be read, if there is no other.
func readKeys(blocks []filekind.Block) (keys []crypto.Signer, err error) {
	for _, b := range blocks {
		if !b.IsKey() {
			continue
		}
		key, keyErr := readKey(b)
		switch {
		case keyErr == nil:
			keys = append(keys, key)
		case err == nil:
			err = keyErr
		}
	}
	if len(keys) > 0 {
		err = nil
	}
	return keys, err
}

func readKey(b filekind.Block) (crypto.Signer, error) {
	file := filekind.Quote(b.Path)
	switch {
	case b.Encrypted && b.Err == nil:
		return nil, fmt.Errorf("%s has a passphrase; remove it with `%s`", b.Path, filekind.Replace("openssl pkey -in "+file+" -out", b.Path))
	case b.Label == "OPENSSH PRIVATE KEY":
		return nil, fmt.Errorf("%s is a key in the form of OpenSSH; bring the key with which the certificate was requested, as PEM", b.Path)
	}
	key, err := b.Key()
	if err != nil {
		return nil, err
	}
	kind := ""
	switch key := key.(type) {
	case *rsa.PrivateKey:
		// crypto/rsa signs with no smaller key, and crypto/tls of clients
		// verifies with no larger one.
		if bits := key.N.BitLen(); bits >= 1024 && bits <= 8192 {
			return key, nil
		}
		kind = fmt.Sprintf("RSA with %d bits", key.N.BitLen())
	case *ecdsa.PrivateKey:
		if key.Curve != elliptic.P224() { // TLS has no signatures with it
			return key, nil
		}
		kind = "ECDSA with P-224"
	case ed25519.PrivateKey:
		return key, nil
	default:
		kind = fmt.Sprintf("%T", key)
	}
	return nil, fmt.Errorf("%s is a key that clients cannot use (%s); make the key and the certificate again, with %s", b, kind, filekind.GoodKeys)
}

// belongs reports whether a certificate is for a key.
func belongs(key crypto.Signer, c certificate) bool {
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(c.PublicKey)
}

func (c ManualConfig) explainNoCertificate(certBlocks, keyBlocks []filekind.Block) error {
	has := func(blocks []filekind.Block, is func(filekind.Block) bool) bool {
		for _, b := range blocks {
			if is(b) {
				return true
			}
		}
		return false
	}
	isCertificate := func(b filekind.Block) bool { return b.Label == "CERTIFICATE" }
	file := filekind.Quote(c.CertFile)
	switch {
	case has(certBlocks, filekind.Block.IsKey) && has(keyBlocks, isCertificate):
		return fmt.Errorf("%s has the private key, and %s the certificate; swap the two files", c.CertFile, c.KeyFile)
	case has(certBlocks, filekind.Block.IsKey):
		return fmt.Errorf("%s has a private key, and no certificate; put the certificate there", c.CertFile)
	}
	switch b := certBlocks[0]; b.Label {
	case "CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST":
		return fmt.Errorf("%s is a certificate request; send it to an authority, and use the certificate that comes back", c.CertFile)
	case "PKCS7", "CMS", "PKCS #7 SIGNED DATA":
		return fmt.Errorf("%s is PKCS#7; run `%s`", c.CertFile, filekind.Replace("openssl pkcs7 -print_certs -in "+file+" -out", c.CertFile))
	case "TRUSTED CERTIFICATE", "X509 CERTIFICATE":
		return fmt.Errorf("%s has a %s; run `%s`", c.CertFile, b.Label, filekind.Replace("openssl x509 -in "+file+" -out", c.CertFile))
	default:
		return fmt.Errorf("%s has no certificate, and begins with %s; put the certificate there", c.CertFile, b.Label)
	}
}

func (c ManualConfig) explainNoKey(certBlocks, keyBlocks []filekind.Block) error {
	for _, b := range certBlocks {
		if b.IsKey() && c.CertFile != c.KeyFile {
			return fmt.Errorf("%s has no private key, but %s has one; name that file for the key too", c.KeyFile, c.CertFile)
		}
	}
	switch label := keyBlocks[0].Label; label {
	case "PUBLIC KEY", "RSA PUBLIC KEY":
		return fmt.Errorf("%s is the public key; put the private key there", c.KeyFile)
	case "CERTIFICATE":
		return fmt.Errorf("%s has a certificate, and no private key; put the private key there", c.KeyFile)
	default:
		return fmt.Errorf("%s has no private key, and begins with %s; put the private key there", c.KeyFile, label)
	}
}

// explainMismatch explains keys that do not belong to the first certificate.
func (c ManualConfig) explainMismatch(all []certificate, keys []crypto.Signer) error {
	for _, other := range all[1:] {
		for _, key := range keys {
			if !belongs(key, other) {
				continue
			}
			if other.IsCA && !all[0].IsCA {
				return fmt.Errorf("%s is the key of the authority %s (block %d of %s), not of the first certificate; put the key of %s there",
					c.KeyFile, title(other.Certificate), other.block.Number, c.CertFile, title(all[0].Certificate))
			}
			file, n := filekind.Quote(c.CertFile), other.block.Number
			split := fmt.Sprintf("(awk '/-BEGIN /{n++} n==%d' %s; awk '/-BEGIN /{n++} n!=%[1]d' %[2]s) >", n, file)
			return fmt.Errorf("%s is the leaf's; put it first, before %s: `%s`",
				other.block, title(all[0].Certificate), filekind.Replace(split, c.CertFile))
		}
	}
	of, is := algorithm(all[0].PublicKey), algorithm(keys[0].Public())
	if of != is {
		return fmt.Errorf("%s is %s key, but the certificate in %s is for %s key; put the key there with which the certificate was requested", c.KeyFile, is, c.CertFile, of)
	}
	return fmt.Errorf("%s does not belong to %s: its public key is %s, and that of the certificate is %s; copy both from the same renewal (derpd reads both again when the other one changes)",
		c.KeyFile, c.CertFile, fingerprint(keys[0].Public()), fingerprint(all[0].PublicKey))
}

// algorithm names the kind of a public key, with its article.
func algorithm(public crypto.PublicKey) string {
	switch public.(type) {
	case *rsa.PublicKey:
		return "an RSA"
	case *ecdsa.PublicKey:
		return "an ECDSA"
	case ed25519.PublicKey:
		return "an Ed25519"
	}
	return "another"
}

// fingerprint is the start of what `openssl pkey -in KEY -pubout | openssl sha256`
// and `openssl x509 -in CERT -noout -pubkey | openssl sha256` print.
func fingerprint(public crypto.PublicKey) string {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "unknown"
	}
	sum := sha256.Sum256(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	return hex.EncodeToString(sum[:8]) + "…"
}

// title names a certificate for messages.
func title(c *x509.Certificate) string {
	if subject := c.Subject.String(); subject != "" {
		return subject
	}
	return covered(c)
}
