//go:build linux

package main

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
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"tailscale.com/derp"
	"tailscale.com/derp/derpconst"
	"tailscale.com/types/key"
)

const (
	handshakeWithin = 10 * time.Second
	bigBuffer       = 64 << 10 // bytes; most that one read of a socket returns
)

// client is one connection to a relay, after its handshake. The load reads and
// writes plain frames. A real client would use as much CPU for each packet as the
// server does.
type client struct {
	conn   net.Conn // TLS
	reader *bufio.Reader
	public key.NodePublic
	held   *bufferedConn // connection below TLS; nil unless the client is busy
}

// flush sends the buffered writes of a busy client.
func (c *client) flush() error { return c.held.writer.Flush() }

// dial connects as derphttp does with DERP's fast start: a TLS handshake, an HTTP
// request, and the exchange of keys without waiting for the response. It returns when
// the server has accepted the client. A busy client has large buffers.
func dial(ctx context.Context, s *server, private key.NodePrivate, from netip.Addr, busy bool) (*client, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeWithin)
	defer cancel()
	var dialer net.Dialer
	if from.IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	tcp, err := dialer.DialContext(ctx, "tcp", s.https.String())
	if err != nil {
		return nil, err
	}
	below, size := tcp, 4<<10
	var held *bufferedConn
	if busy {
		held = &bufferedConn{Conn: tcp, reader: bufio.NewReaderSize(tcp, bigBuffer)}
		below, size = held, bigBuffer
	}
	conn := tls.Client(below, clientTLS(s.certificate))
	c, err := handshake(ctx, conn, private, size)
	if err != nil {
		_ = tcp.Close()
		return nil, err
	}
	if c.held = held; busy {
		// Writes are buffered until flush from here on.
		held.writer = bufio.NewWriterSize(tcp, bigBuffer)
	}
	return c, nil
}

func handshake(ctx context.Context, conn *tls.Conn, private key.NodePrivate, size int) (*client, error) {
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
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+hostname+"/derp", nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Upgrade", "DERP")
	request.Header.Set("Connection", "Upgrade")
	request.Header.Set(derp.FastStartHeader, "1")
	c := &client{conn: conn, reader: bufio.NewReaderSize(conn, size), public: private.Public()}
	writer := bufio.NewWriter(conn)
	if err := request.Write(writer); err != nil {
		return nil, err
	}
	quiet := func(string, ...any) {}
	if _, err := derp.NewClient(private, conn, bufio.NewReadWriter(c.reader, writer), quiet, derp.ServerPublicKey(server)); err != nil {
		return nil, err
	}
	for {
		kind, length, err := derp.ReadFrameHeader(c.reader)
		if err != nil {
			return nil, fmt.Errorf("waiting for the server's info frame: %w", err)
		}
		if _, err := c.reader.Discard(int(length)); err != nil {
			return nil, err
		}
		if kind == derp.FrameServerInfo {
			return c, conn.SetDeadline(time.Time{})
		}
	}
}

// readAtLeast makes reads of a busy client wait for this number of bytes. A client
// that wakes for every segment would use more CPU than the server.
func (c *client) readAtLeast(bytes int) error {
	raw, err := c.held.Conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = os.NewSyscallError("setting SO_RCVLOWAT", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, bytes))
	})
	return errors.Join(err, failed)
}

// close closes the connection. It may be called while a busy client reads and
// writes. For a busy client, close sends no close message of TLS, because another
// goroutine may use the writer.
func (c *client) close() {
	if c.held != nil {
		_ = c.held.Close()
		return
	}
	_ = c.conn.Close()
}

// clientTLS returns derphttp's TLS configuration, but trusts one certificate. The
// key exchange is Go's default for both servers: X25519MLKEM768.
func clientTLS(want *x509.Certificate) *tls.Config {
	return &tls.Config{
		ServerName: hostname, MinVersion: tls.VersionTLS13,
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

// bufferedConn reads and writes many TLS records with one system call. With as many
// calls as the server, the load would be slower than the server.
type bufferedConn struct {
	net.Conn
	reader *bufio.Reader
	writer *bufio.Writer // nil during the handshake
}

func (c *bufferedConn) Read(p []byte) (int, error) { return c.reader.Read(p) }

func (c *bufferedConn) Write(p []byte) (int, error) {
	if c.writer == nil {
		return c.Conn.Write(p)
	}
	return c.writer.Write(p)
}
