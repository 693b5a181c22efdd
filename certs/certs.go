// Package certs gives the HTTPS listener its certificates. There is one file
// for each way to get them: acme.go asks a certificate authority, manual.go
// reads files that something else keeps, pinned.go makes a self-signed
// certificate whose hash stands in the DERP map.
package certs

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"net/http"
)

// ErrNone is the state of a manager that waits for its first certificate.
var ErrNone = errors.New("no certificate yet")

// Manager keeps the certificates of one mode.
type Manager interface {
	// GetCertificate is for [tls.Config]. It fails while there is none.
	GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error)

	// HTTPHandler answers ACME challenges on the plain HTTP listener, and
	// passes everything else to next.
	HTTPHandler(next http.Handler) http.Handler

	// Run obtains and renews until ctx ends.
	Run(ctx context.Context) error

	// Ready is closed when there is a certificate to serve.
	Ready() <-chan struct{}

	// Status is the certificate as it is now. Names are not in it: ask the
	// leaf.
	Status() Status
}

// Status describes the certificate that clients get.
type Status struct {
	// Leaf is nil while there is no certificate.
	Leaf *x509.Certificate

	// Pin is the CertName of a self-signed certificate in the DERP map,
	// and empty for one that a certificate authority signed.
	Pin string

	// Err is why there is no certificate, or why it could not be renewed.
	Err error

	// Reloads counts the certificates that took the place of the first one,
	// and ReloadErrors the attempts that brought none.
	Reloads, ReloadErrors uint64
}

// Pin is the CertName by which clients recognise exactly this certificate:
// "sha256-raw:" and the hash of its DER form (tailcfg.DERPNode.CertName).
func Pin(leaf *x509.Certificate) string {
	sum := sha256.Sum256(leaf.Raw)
	return "sha256-raw:" + hex.EncodeToString(sum[:])
}
