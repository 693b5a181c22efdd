package relay

import (
	"crypto/tls"
	"slices"

	"tailscale.com/derp/derpserver"
)

// acmeTLS1 is the ALPN protocol of the TLS-ALPN-01 challenge (RFC 8737).
const acmeTLS1 = "acme-tls/1"

// tlsConfig returns the configuration of the public listener. After the
// certificate of getCertificate the server sends the meta certificate. It lets
// clients start before the HTTP response (derpserver's fast start).
func tlsConfig(server *derpserver.Server, getCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	c := &tls.Config{
		GetCertificate: getCertificate,
		MinVersion:     tls.VersionTLS12,
		// Without h2: DERP hijacks the connection, and HTTP/2 has no hijacking.
		NextProtos: []string{"http/1.1", acmeTLS1},
		// Small records at first help browsers, which show half a page. A DERP
		// frame is of use only when it is complete.
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
