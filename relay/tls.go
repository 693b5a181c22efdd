package relay

import (
	"crypto/tls"
	"slices"

	"tailscale.com/derp/derpserver"
)

// acmeTLS1 is the ALPN protocol of the TLS-ALPN-01 challenge (RFC 8737).
const acmeTLS1 = "acme-tls/1"

// tlsConfig returns the configuration of the public listener. The server sends the
// meta certificate after the certificate of getCertificate. With the meta
// certificate, clients start before the HTTP response (derpserver's fast start).
func tlsConfig(server *derpserver.Server, getCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	c := &tls.Config{
		GetCertificate: getCertificate,
		MinVersion:     tls.VersionTLS12,
		// No h2: DERP hijacks the connection, and HTTP/2 does not support that.
		NextProtos: []string{"http/1.1", acmeTLS1},
		// Small records at the start help browsers to show part of a page. A
		// DERP frame is useful only when it is complete.
		DynamicRecordSizingDisabled: true,
	}
	server.ModifyTLSConfigToAddMetaCert(c)
	withMeta := c.GetCertificate
	c.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		// A challenge certificate is sent alone (RFC 8737 §3).
		if slices.Contains(hello.SupportedProtos, acmeTLS1) {
			return getCertificate(hello)
		}
		return withMeta(hello)
	}
	return c
}
