package healthz

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/netmon"
	"tailscale.com/net/stun"
	"tailscale.com/net/tlsdial"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// stunRetry is the wait for one STUN response before the next request. UDP packets
// may be lost even on the loopback interface.
const stunRetry = 500 * time.Millisecond

// DERPProbe connects two clients to a relay. One sends a packet to the other.
type DERPProbe struct {
	// Host is the relay's name in HTTP and TLS.
	Host string

	// Dial connects to the relay's listener. It does not resolve Host.
	Dial func(ctx context.Context) (net.Conn, error)

	// Judge returns the verdict on the certificates of a handshake; nil for plain
	// HTTP. The probe fails if clients refuse the certificates.
	Judge func(sent []*x509.Certificate) Verdict

	// CertName is the CertName of the relay in the DERP map.
	CertName string

	// Leaf is the certificate that is expected. It may be nil, which costs one more
	// handshake.
	Leaf *x509.Certificate

	// From and To are the node keys of the clients.
	From, To key.NodePrivate
}

// Run connects as clients do, by TCP, TLS, HTTP, DERP and admission, and passes a
// packet. It returns the time for all of it.
func (p DERPProbe) Run(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	from, err := p.connect(ctx, p.From)
	if err != nil {
		return 0, err
	}
	defer func() { _ = from.Close() }()
	to, err := p.connect(ctx, p.To)
	if err != nil {
		return 0, err
	}
	defer func() { _ = to.Close() }()
	if err := pass(ctx, from, to); err != nil {
		return 0, fmt.Errorf("a packet between two clients: %w", err)
	}
	return time.Since(start), nil
}

// connect returns a client that the relay has admitted.
func (p DERPProbe) connect(ctx context.Context, private key.NodePrivate) (_ *derphttp.Client, err error) {
	// The URL is http because dial does the TLS handshake itself. With https,
	// derphttp would load the system roots first, which is slow.
	host := p.Host
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	client, err := derphttp.NewClient(private, "http://"+host+"/derp", logger.Discard, netmon.NewStatic())
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = client.Close()
		}
	}()
	client.IsProber = true
	var cause error
	client.SetURLDialer(func(ctx context.Context, _, _ string) (conn net.Conn, err error) {
		conn, cause = p.dial(ctx)
		return conn, cause
	})
	if err := client.Connect(ctx); err != nil {
		if cause == nil {
			cause = ctx.Err()
		}
		return nil, causedError{err, cause}
	}
	// The relay decides on admission after the DERP handshake. It then sends
	// its server information, or closes the connection.
	stop := context.AfterFunc(ctx, func() { _ = client.Close() })
	defer stop()
	message, err := client.Recv()
	if err != nil {
		return nil, fmt.Errorf("the relay closed the connection after the DERP handshake: %w", errors.Join(context.Cause(ctx), err))
	}
	if _, ok := message.(derp.ServerInfoMessage); !ok {
		return nil, fmt.Errorf("the relay sent %T in place of its server information", message)
	}
	return client, nil
}

// causedError is an error of derphttp, which does not wrap its cause.
type causedError struct {
	error
	cause error
}

// Unwrap returns the cause.
func (e causedError) Unwrap() error { return e.cause }

// dial returns a connection for HTTP, after the TLS handshake if there is one.
func (p DERPProbe) dial(ctx context.Context) (net.Conn, error) {
	if p.Judge == nil {
		return p.Dial(ctx)
	}
	conn, err := p.handshake(ctx, p.Leaf)
	// Another certificate than the expected one may be good as well.
	if refused, ok := errors.AsType[*tls.CertificateVerificationError](err); ok && len(refused.UnverifiedCertificates) > 0 {
		if err := p.Judge(refused.UnverifiedCertificates).Err(); err != nil {
			return nil, err
		}
		return p.handshake(ctx, refused.UnverifiedCertificates[0])
	}
	return conn, err
}

// handshake connects with TLS. Without a pin, crypto/tls trusts the leaf alone, so that
// the chain and the roots are left to Judge, which remembers them.
func (p DERPProbe) handshake(ctx context.Context, leaf *x509.Certificate) (net.Conn, error) {
	conn, err := p.Dial(ctx)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{
		ServerName: p.Host, RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12,
		// P-256 is the cheapest key exchange. The first probe delays the
		// start, and the loopback interface needs no post-quantum secrecy.
		CurvePreferences: []tls.CurveID{tls.CurveP256},
	}
	if leaf != nil {
		config.RootCAs.AddCert(leaf)
	}
	if hash, pinned := strings.CutPrefix(p.CertName, pinPrefix); pinned {
		tlsdial.SetConfigExpectedCertHash(config, hash)
	}
	byClients := config.VerifyConnection
	config.VerifyConnection = func(state tls.ConnectionState) error {
		if err := p.Judge(state.PeerCertificates).Err(); err != nil || byClients == nil {
			return err
		}
		return byClients(state)
	}
	client := tls.Client(conn, config)
	if err := client.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return client, nil
}

// pass sends a packet and waits for the same packet to arrive.
func pass(ctx context.Context, from, to *derphttp.Client) error {
	stop := context.AfterFunc(ctx, func() {
		_ = from.Close()
		_ = to.Close()
	})
	defer stop()
	// 1280 bytes is the MTU of Tailscale's interface.
	packet := make([]byte, 1280)
	_, _ = rand.Read(packet) // never fails
	if err := from.Send(to.SelfPublicKey(), packet); err != nil {
		return err
	}
	for {
		message, err := to.Recv()
		if err != nil {
			return errors.Join(context.Cause(ctx), err)
		}
		received, ok := message.(derp.ReceivedPacket)
		switch {
		case !ok: // a keepalive, for example
		case received.Source != from.SelfPublicKey() || !bytes.Equal(received.Data, packet):
			return errors.New("the packet that arrived is not the one that was sent")
		default:
			return nil
		}
	}
}

// STUN sends a binding request to the server at addr. It checks that the response
// names the request's own source address, and returns the round trip time.
func STUN(ctx context.Context, addr netip.AddrPort) (time.Duration, error) {
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(addr))
	if err != nil {
		return 0, err
	}
	seen, took, err := AskSTUN(ctx, conn)
	if err != nil {
		return 0, err
	}
	if self := conn.LocalAddr().(*net.UDPAddr).AddrPort(); seen != netip.AddrPortFrom(self.Addr().Unmap(), self.Port()) {
		return 0, fmt.Errorf("the response names %s, but the request came from %s", seen, self)
	}
	return took, nil
}

// AskSTUN sends binding requests (RFC 8489) over conn until a response arrives or
// ctx ends. It returns the address in the response and the round trip time, and
// closes conn.
func AskSTUN(ctx context.Context, conn net.Conn) (seen netip.AddrPort, took time.Duration, err error) {
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()

	for {
		seen, took, err := askOnce(conn)
		switch {
		case err == nil:
			return seen, took, nil
		case ctx.Err() != nil: // its end has closed conn
			return seen, 0, fmt.Errorf("no response from %s: %w", conn.RemoteAddr(), context.Cause(ctx))
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return seen, 0, err
		}
	}
}

// askOnce sends one request and waits for its response. It skips all other
// packets.
func askOnce(conn net.Conn) (seen netip.AddrPort, took time.Duration, err error) {
	tx := stun.NewTxID()
	buf := make([]byte, 1500)
	start := time.Now()
	if err := conn.SetReadDeadline(start.Add(stunRetry)); err != nil {
		return seen, 0, err
	}
	if _, err := conn.Write(stun.Request(tx)); err != nil {
		return seen, 0, err
	}
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return seen, 0, err
		}
		if got, addr, err := stun.ParseResponse(buf[:n]); err == nil && got == tx {
			return netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port()), time.Since(start), nil
		}
	}
}
