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
//
// The meta certificate has the relay's node key in its name, and host scanners
// store it. For this reason only clients that send one of the relay's names get
// it. Before TLS 1.3 certificates are not encrypted, and clients ignore the meta
// certificate (derphttp.Client), so nobody gets it.
func tlsConfig(server *derpserver.Server, own names, turns *turns, getCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		// No h2: DERP hijacks the connection, and HTTP/2 does not support that.
		NextProtos: []string{"http/1.1", acmeTLS1},
		// Small records at the start help browsers to show part of a page. A
		// DERP frame is useful only when it is complete.
		DynamicRecordSizingDisabled: true,
		GetConfigForClient:          func(hello *tls.ClientHelloInfo) (*tls.Config, error) { return nil, turns.take(hello.Conn) },
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			// A second ClientHello (HelloRetryRequest) needs a second turn.
			if err := turns.take(hello.Conn); err != nil {
				return nil, err
			}
			cert, err := getCertificate(hello)
			if err != nil || cert == nil {
				return nil, err
			}
			// A challenge certificate is sent alone (RFC 8737 §3).
			if slices.Contains(hello.SupportedProtos, acmeTLS1) ||
				!slices.Contains(hello.SupportedVersions, tls.VersionTLS13) || !own.own(hello.ServerName, cert) {
				return cert, nil
			}
			// Other handshakes use cert too, so only a copy may change.
			withMeta := *cert
			withMeta.Certificate = append(slices.Clip(cert.Certificate), server.MetaCert())
			return &withMeta, nil
		},
	}
}
