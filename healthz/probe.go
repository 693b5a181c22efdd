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
	"time"

	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/netmon"
	"tailscale.com/net/stun"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// stunRetry is how long a probe waits before it asks again: UDP may be lost
// even on the loopback interface.
const stunRetry = 500 * time.Millisecond

// DERPProbe is two clients of a relay, one of which sends a packet to the other.
type DERPProbe struct {
	// Host is the name of the relay, in HTTP and in TLS.
	Host string

	// Dial reaches the listener, whatever the name.
	Dial func(ctx context.Context) (net.Conn, error)

	// Leaf is the certificate that must be presented; nil without TLS.
	Leaf *x509.Certificate

	// From and To are the node keys of the clients.
	From, To key.NodePrivate
}

// Run goes all the way that clients go: TCP, TLS, HTTP, DERP, admission, and a
// packet. It returns how long that took.
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

// connect returns a client that the relay has admitted and registered.
func (p DERPProbe) connect(ctx context.Context, private key.NodePrivate) (_ *derphttp.Client, err error) {
	// Not https: derphttp would verify by the roots of the system first, and
	// to read those takes longer than all the rest of a start.
	client, err := derphttp.NewClient(private, "http://"+p.Host+"/derp", logger.Discard, netmon.NewStatic())
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = client.Close()
		}
	}()
	client.IsProber = true
	client.SetURLDialer(func(ctx context.Context, _, _ string) (net.Conn, error) { return p.dial(ctx) })
	if err := client.Connect(ctx); err != nil {
		return nil, err
	}
	// The relay says whether it admits a client only after the handshake:
	// it sends its server information, or it hangs up.
	stop := context.AfterFunc(ctx, func() { _ = client.Close() })
	defer stop()
	message, err := client.Recv()
	if err != nil {
		return nil, fmt.Errorf("the relay hung up after the handshake: %w", errors.Join(context.Cause(ctx), err))
	}
	if _, ok := message.(derp.ServerInfoMessage); !ok {
		return nil, fmt.Errorf("the relay sent %T where its server information belongs", message)
	}
	return client, nil
}

// dial returns a connection that is ready for HTTP.
func (p DERPProbe) dial(ctx context.Context) (net.Conn, error) {
	conn, err := p.Dial(ctx)
	if err != nil || p.Leaf == nil {
		return conn, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(p.Leaf)
	client := tls.Client(conn, &tls.Config{
		ServerName: p.Host, RootCAs: roots, MinVersion: tls.VersionTLS12,
		// The cheapest: nobody listens on the loopback interface, and the
		// first check is in the way of the first clients.
		CurvePreferences: []tls.CurveID{tls.CurveP256},
	})
	if err := client.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return client, nil
}

// pass sends a packet, and waits until it arrives as it was sent.
func pass(ctx context.Context, from, to *derphttp.Client) error {
	stop := context.AfterFunc(ctx, func() {
		_ = from.Close()
		_ = to.Close()
	})
	defer stop()
	// As long as what WireGuard sends by the most common MTU.
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
			return errors.New("another one arrived than was sent")
		default:
			return nil
		}
	}
}

// STUN asks the STUN server at addr for the address it sees, and checks that
// it is the one that asked. It returns the round trip time.
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
		return 0, fmt.Errorf("the answer names %s, the request came from %s", seen, self)
	}
	return took, nil
}

// AskSTUN sends binding requests (RFC 8489) over conn until one is answered,
// since UDP may be lost, or ctx ends. It returns the address that the server
// sees and the round trip time, and closes conn.
func AskSTUN(ctx context.Context, conn net.Conn) (seen netip.AddrPort, took time.Duration, err error) {
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()

	for {
		seen, took, err := askOnce(conn)
		switch {
		case err == nil:
			return seen, took, nil
		case ctx.Err() != nil: // which closed conn
			return seen, 0, fmt.Errorf("no answer from %s: %w", conn.RemoteAddr(), context.Cause(ctx))
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return seen, 0, err
		}
	}
}

// askOnce sends one request and waits for its answer, past whatever else
// arrives.
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
