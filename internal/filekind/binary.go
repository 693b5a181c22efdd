package filekind

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"path/filepath"
	"strings"
)

// Object identifiers in DER, with their tag and length (RFC 2315, RFC 8018).
var (
	pkcs7Data   = []byte{0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x01}
	pkcs7Signed = []byte{0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x02}
	pbes2       = []byte{0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x05, 0x0d}
)

// signatures are the first bytes of archives and key stores.
var signatures = []struct{ start, kind, fix string }{
	{"PK\x03\x04", "a ZIP archive", "unpack it, and take the PEM files in it (authorities often name them after nginx)"},
	{"\x1f\x8b", "compressed with gzip", "unpack it, and take the PEM files in it"},
	{"\xfe\xed\xfe\xed", "a Java key store", "export its certificate and key with `keytool -importkeystore -deststoretype PKCS12`"},
}

// binary refuses a binary file, and names the command that makes PEM of it.
func binary(path string, data []byte) error {
	for _, s := range signatures {
		if bytes.HasPrefix(data, []byte(s.start)) {
			return fmt.Errorf("%s is %s; %s", path, s.kind, s.fix)
		}
	}
	// 0x30 is a SEQUENCE, and the digit 0. A length of 128 or more is no text.
	if data[0] == 0x30 && (len(data) > 1 && data[1] >= 0x80 || kindOf(data) != unknown) {
		return derFault(path, data)
	}
	if bytes.IndexByte(data, 0) >= 0 {
		return fmt.Errorf("%s is a binary file of an unknown kind; bring it as text (PEM for certificates and keys)", path)
	}
	return nil
}

// derFault names the kind of a file in DER, or in BER as Windows and Java write it.
func derFault(path string, data []byte) error {
	file, stem := Quote(path), strings.TrimSuffix(path, filepath.Ext(path))
	certOut, keyOut := Quote(stem+".crt.pem"), Quote(stem+".key.pem")
	switch kindOf(data) {
	case pfx:
		return fmt.Errorf("%s is PKCS#12 (PFX); run `openssl pkcs12 -in %s -nokeys -out %s` and `openssl pkcs12 -in %[2]s -nocerts -nodes -out %[4]s`, and use those two files", path, file, certOut, keyOut)
	case pkcs7:
		return fmt.Errorf("%s is PKCS#7 in DER form; run `openssl pkcs7 -inform DER -print_certs -in %s -out %s`, and use that file", path, file, certOut)
	case derCertificate:
		return fmt.Errorf("%s is a certificate in DER form; run `%s`", path, Replace("openssl x509 -inform DER -in "+file+" -out", path))
	case derRequest:
		return fmt.Errorf("%s is a certificate request; send it to an authority, and use the certificate that comes back", path)
	case derKey, derEncryptedKey:
		return fmt.Errorf("%s is a private key in DER form; run `%s`", path, Replace("openssl pkey -inform DER -in "+file+" -out", path))
	}
	return fmt.Errorf("%s is in DER form, but neither a certificate nor a key; bring it as PEM", path)
}

type kind int

const (
	unknown kind = iota
	pfx
	pkcs7
	derCertificate
	derRequest
	derKey
	derEncryptedKey
)

// kindOf recognises DER. The containers are recognised by their first object
// identifier, because they may be BER.
func kindOf(data []byte) kind {
	start := data[:min(len(data), 64)]
	if i := bytes.Index(start, pkcs7Data); i > 0 && bytes.Contains(start[:i], []byte{0x02, 0x01, 0x03}) {
		return pfx
	}
	if i := bytes.Index(start, pkcs7Signed); i > 0 && i < 8 {
		return pkcs7
	}
	if _, err := x509.ParseCertificate(data); err == nil {
		return derCertificate
	}
	if _, err := x509.ParseCertificateRequest(data); err == nil {
		return derRequest
	}
	if _, err := parseKey(data); err == nil {
		return derKey
	}
	if i := bytes.Index(start, pbes2); i > 0 && i < 16 {
		return derEncryptedKey
	}
	return unknown
}

// parseKey parses a private key in any form that crypto/tls accepts.
func parseKey(der []byte) (any, error) {
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err == nil {
		return key, nil
	}
	if key, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return key, nil
	}
	if key, err := x509.ParseECPrivateKey(der); err == nil {
		return key, nil
	}
	return nil, err
}
