//go:build linux

package testrelay

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"tailscale.com/derp"
	"tailscale.com/derp/derpconst"
	"tailscale.com/types/key"
)

const (
	handshakeWithin = 10 * time.Second
	smallBuffer     = 4 << 10 // bytes
)

// Client is one connection to a relay, after its handshake.
type Client struct {
	Conn   *tls.Conn
	Reader *bufio.Reader
	Public key.NodePublic
}

// Close closes the connection.
func (c *Client) Close() { _ = c.Conn.Close() }

// Target is a server as a client sees it.
type Target struct {
	HTTPS       netip.AddrPort
	Certificate *x509.Certificate
}

// DialTCP connects from an address, or from any if it is not valid.
func DialTCP(ctx context.Context, to netip.AddrPort, from netip.Addr) (net.Conn, error) {
	var dialer net.Dialer
	if from.IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	return dialer.DialContext(ctx, "tcp", to.String())
}

// Dial connects from an address, or from any if it is not valid. It returns when the
// server has admitted the client.
func Dial(ctx context.Context, to Target, private key.NodePrivate, from netip.Addr) (*Client, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeWithin)
	defer cancel()
	tcp, err := DialTCP(ctx, to.HTTPS, from)
	if err != nil {
		return nil, err
	}
	c, err := Handshake(ctx, tls.Client(tcp, ClientTLS(to.Certificate)), private, smallBuffer)
	if err != nil {
		_ = tcp.Close()
		return nil, err
	}
	return c, nil
}

// Handshake connects as derphttp does with DERP's fast start: a TLS handshake, an HTTP
// request, and the exchange of keys without waiting for the response. It returns when
// the server has admitted the client. The reader has a buffer of the given size.
func Handshake(ctx context.Context, conn *tls.Conn, private key.NodePrivate, size int) (*Client, error) {
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	server, err := serverKey(conn.ConnectionState().PeerCertificates)
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return nil, err
		}
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+Hostname+"/derp", nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Upgrade", "DERP")
	request.Header.Set("Connection", "Upgrade")
	request.Header.Set(derp.FastStartHeader, "1")
	c := &Client{Conn: conn, Reader: bufio.NewReaderSize(conn, size), Public: private.Public()}
	writer := bufio.NewWriter(conn)
	if err := request.Write(writer); err != nil {
		return nil, err
	}
	quiet := func(string, ...any) {}
	if _, err := derp.NewClient(private, conn, bufio.NewReadWriter(c.Reader, writer), quiet, derp.ServerPublicKey(server)); err != nil {
		return nil, err
	}
	for {
		kind, length, err := derp.ReadFrameHeader(c.Reader)
		if err != nil {
			return nil, fmt.Errorf("waiting for the server's info frame: %w", err)
		}
		if kind == derp.FrameHealth {
			return nil, errors.New("the server refuses this node") // and explains in the frame why
		}
		if _, err := c.Reader.Discard(int(length)); err != nil {
			return nil, err
		}
		if kind == derp.FrameServerInfo {
			return c, conn.SetDeadline(time.Time{})
		}
	}
}

// ClientTLS returns derphttp's TLS configuration, but trusts one certificate. The
// key exchange is Go's default for both servers: X25519MLKEM768.
func ClientTLS(want *x509.Certificate) *tls.Config {
	return &tls.Config{
		ServerName: Hostname, MinVersion: tls.VersionTLS13,
		InsecureSkipVerify: true, // VerifyConnection checks the certificate
		VerifyConnection: func(state tls.ConnectionState) error {
			if !state.PeerCertificates[0].Equal(want) {
				return errors.New("the server does not have the certificate of this measurement")
			}
			return nil
		},
		// A burst must be one record, also at the start of a connection.
		DynamicRecordSizingDisabled: true,
	}
}

// serverKey returns the relay's key from its meta certificate.
func serverKey(chain []*x509.Certificate) (key.NodePublic, error) {
	for _, certificate := range chain {
		if hex, found := strings.CutPrefix(certificate.Subject.CommonName, derpconst.MetaCertCommonNamePrefix); found {
			var public key.NodePublic
			err := public.UnmarshalText([]byte("nodekey:" + hex))
			return public, err
		}
	}
	return key.NodePublic{}, errors.New("no meta certificate; the server does not support the fast start")
}
