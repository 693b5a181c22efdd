package issuer_test

import (
	"crypto/tls"
	"crypto/x509"
	"testing"

	"derpd/internal/issuer"
	"derpd/internal/testkit"
)

func TestSigned(t *testing.T) {
	authority := func(name string, by *tls.Certificate, change func(*x509.Certificate)) *tls.Certificate {
		return testkit.NewCertificate(t, testkit.Certificate{Names: []string{name}, CA: true, Issuer: by, Change: change})
	}
	sha1 := func(c *x509.Certificate) { c.SignatureAlgorithm = x509.ECDSAWithSHA1 }
	root, namesake := authority("Root", nil, nil), authority("Root", nil, nil)
	for _, tt := range []struct {
		name                         string
		c, by                        *tls.Certificate
		signed, self, weakSignatures bool
	}{
		{"root", root, root, true, true, false},
		{"root with a weak signature", authority("Root", nil, sha1), root, false, true, false},
		{"issued", authority("I", root, nil), root, true, false, false},
		{"issued with a weak signature", authority("I", root, sha1), root, true, false, true},
		{"issued by a namesake", authority("I", namesake, nil), root, false, false, false},
		{"issued by an issuer of the same name", authority("Root", root, nil), root, true, false, false},
	} {
		if got := issuer.Signed(tt.c.Leaf, tt.by.Leaf); got != tt.signed {
			t.Errorf("%s: signed %t", tt.name, got)
		}
		if got := issuer.SelfSigned(tt.c.Leaf); got != tt.self {
			t.Errorf("%s: self-signed %t", tt.name, got)
		}
		if got := issuer.Weak(tt.c.Leaf); got != tt.weakSignatures {
			t.Errorf("%s: weak %t", tt.name, got)
		}
	}
}

func TestPublicURL(t *testing.T) {
	const public = "http://r3.i.lencr.org/"
	for _, tt := range []struct {
		urls []string
		want string
	}{
		{nil, ""},
		{[]string{public}, public},
		{[]string{"HTTP://CA.example.com./a.crt"}, "HTTP://CA.example.com./a.crt"},
		{[]string{public, "ldap:///CN=CA"}, ""},
		{[]string{"https://ca.example.com/"}, ""},
		{[]string{"http://ca.example.com:8200/v1/pki/ca"}, ""},
		{[]string{"http://10.0.0.1/ca.crt"}, ""},
		{[]string{"http://ca/ca.crt"}, ""},
		{[]string{"http://pki.corp.LOCAL/ca.crt"}, ""},
		{[]string{"%"}, ""},
	} {
		if got := issuer.PublicURL(&x509.Certificate{IssuingCertificateURL: tt.urls}); got != tt.want {
			t.Errorf("%q: %q", tt.urls, got)
		}
	}
}
