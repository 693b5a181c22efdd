// Package certs provides the certificates of the HTTPS listener. Each way to get
// one is a [Manager]:
//
//   - acme.go obtains and renews certificates of a certificate authority.
//     authority.go describes the authority, and obtain.go retries. faults.go
//     stores the errors, and cause.go explains them. storage.go stores the
//     certificates. zap.go logs for certmagic. dns.go and dns_*.go prove names
//     by DNS-01.
//   - manual.go reads a certificate and a key that another program renews. pair.go
//     and chain.go explain files that do not work, with the command that corrects
//     them.
//   - pinned.go creates a self-signed certificate. The DERP map contains its
//     hash, which clients verify.
//
// Each DNS provider is one file, such as dns_gandi.go, with its variables. A new
// provider is one such file and its module in go.mod.
//
// files.go reloads the files of manual.go and pinned.go, and accept.go holds those back
// that need a new map. names.go handles the names of a certificate.
package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
)

// ErrNone is the error of a manager without a certificate.
var ErrNone = errors.New("no certificate yet")

// Manager provides the certificates of one mode.
type Manager interface {
	// GetCertificate is for [tls.Config]. It fails while there is no
	// certificate.
	GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error)

	// HTTPHandler answers ACME challenges on the plain HTTP listener, and
	// passes all other requests to next.
	HTTPHandler(next http.Handler) http.Handler

	// Run obtains and renews certificates until ctx ends.
	Run(ctx context.Context) error

	// Ready is closed once there is a certificate to serve.
	Ready() <-chan struct{}

	// Status returns the current certificate and the last error.
	Status() Status

	// Accept serves the certificate that waits, though clients then need a new
	// map. hash is the start of its SHA-256 in hex; empty for the one that Status
	// has named. The error is [ErrNothingWaits] if none waits.
	Accept(hash string) error
}

// Status is the state of a [Manager].
type Status struct {
	// Leaf is the certificate that clients get; nil while there is none.
	Leaf *x509.Certificate

	// Chain is what clients get, in DER: Leaf and the certificates after it.
	Chain [][]byte

	// Pin is the CertName of a self-signed certificate in the DERP map. It
	// is empty for a certificate that an authority has signed.
	Pin string

	// Waiting is a valid certificate in the files that is not served before
	// Accept, since clients need a new map for it; nil for none. Err has the
	// reason.
	Waiting *x509.Certificate

	// Err is the reason why there is no certificate, or why its renewal failed.
	// It may be nil.
	Err error

	// Reloads counts the certificates that replaced another certificate, and
	// ReloadErrors the failed attempts.
	Reloads, ReloadErrors uint64
}

// pinPrefix begins a CertName that is a hash (tailcfg.DERPNode.CertName).
const pinPrefix = "sha256-raw:"

// Pin returns the CertName with which clients accept this certificate alone:
// "sha256-raw:" and the SHA-256 of the DER form (tailcfg.DERPNode.CertName).
func Pin(leaf *x509.Certificate) string { return pinPrefix + hash(leaf) }
