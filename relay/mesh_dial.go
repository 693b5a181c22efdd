package relay

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"strings"

	"tailscale.com/derp"
	"tailscale.com/net/tlsdial"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// dial connects to a node and verifies its certificate, since the mesh key is
// sent on this connection.
func (n MeshNode) dial(ctx context.Context, roots *x509.CertPool) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, meshTimeout)
	defer cancel()
	config := &tls.Config{ServerName: n.Host, RootCAs: roots, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
	if n.CertHash != "" {
		// Clients verify the hash in the map in the same way.
		tlsdial.SetConfigExpectedCertHash(config, strings.ToLower(n.CertHash))
	}
	addr := n.Dial
	if addr == "" {
		addr = n.hostPort()
	}
	return (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", addr)
}

// upgrade turns a connection from HTTP to DERP, as clients do.
func upgrade(ctx context.Context, conn net.Conn, p *meshPeer, self key.NodePrivate, meshKey key.DERPMesh) (*derp.Client, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+p.hostPort()+"/derp", http.NoBody)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Upgrade", "DERP")
	req.Header.Set("Connection", "Upgrade")
	if err := req.Write(conn); err != nil {
		return nil, err
	}
	brw := bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn))
	res, err := http.ReadResponse(brw.Reader, req)
	if err != nil {
		return nil, err
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusSwitchingProtocols {
		return nil, fmt.Errorf("upgrading to DERP: the node returned %s", res.Status)
	}
	return derp.NewClient(self, conn, brw, logger.Discard, derp.MeshKey(meshKey))
}
