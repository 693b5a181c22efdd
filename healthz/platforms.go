package healthz

import (
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"time"

	"derpd/internal/issuer"
)

// Apple's verifier refuses what exceeds these limits, and Go's does not. Tailscale
// leaves the verification to the system on Apple's systems and on Windows. The limits
// hold for private authorities too (https://support.apple.com/en-us/103769).
const (
	maxLifetime = 825 * 24 * time.Hour
	minRSA      = 2048 // bits
)

// onPlatforms adds to a verdict what verifiers of other systems refuse. The path is the
// leaf and its issuers, as sent.
func onPlatforms(v Verdict, path []*x509.Certificate) Verdict {
	cause, fix := platformFault(path)
	switch {
	case cause == "" || v.Level == Fail:
		return v
	case v.Level == Warn:
		cause, fix = v.Cause+", and "+cause, v.Fix+"; "+fix
	}
	v.Level, v.Cause, v.Fix = Warn, cause, fix
	return v
}

func platformFault(path []*x509.Certificate) (cause, fix string) {
	for _, c := range path {
		public, ok := c.PublicKey.(*rsa.PublicKey)
		if ok && public.N.BitLen() < minRSA && !issuer.SelfSigned(c) {
			return fmt.Sprintf("clients on macOS, iOS and Windows refuse the RSA key of %s, which has %d bits", called(c), public.N.BitLen()),
				"get a certificate with an RSA key of 2048 bits or an ECDSA key"
		}
	}
	if life := path[0].NotAfter.Sub(path[0].NotBefore); life > maxLifetime {
		return fmt.Sprintf("clients on macOS and iOS refuse the lifetime of the certificate of %s, which is %d days", called(path[0]), life/(24*time.Hour)),
			"get a certificate of at most 825 days"
	}
	return "", ""
}
