//go:build linux

package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"tailscale.com/types/key"

	"derpd/internal/testrelay"
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
	tcp, err := testrelay.DialTCP(ctx, s.HTTPS, from)
	if err != nil {
		return nil, err
	}
	below, size := tcp, 4<<10
	var held *bufferedConn
	if busy {
		held = &bufferedConn{Conn: tcp, reader: bufio.NewReaderSize(tcp, bigBuffer)}
		below, size = held, bigBuffer
	}
	accepted, err := testrelay.Handshake(ctx, tls.Client(below, testrelay.ClientTLS(s.Certificate)), private, size)
	if err != nil {
		_ = tcp.Close()
		return nil, err
	}
	c := &client{conn: accepted.Conn, reader: accepted.Reader, public: accepted.Public, held: held}
	if busy {
		// Writes are buffered until flush from here on.
		held.writer = bufio.NewWriterSize(tcp, bigBuffer)
	}
	return c, nil
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
