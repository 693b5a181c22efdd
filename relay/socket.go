package relay

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// readAheadSize leaves room for a TLS record, the header of the next record, and
// more.
const readAheadSize = 32 << 10

// readAheadBuffers holds *[readAheadSize]byte.
var readAheadBuffers = sync.Pool{New: func() any { return new([readAheadSize]byte) }}

// socketListener accepts TCP connections that use fewer and cheaper system
// calls than those of package net.
//
// Reads go through a buffer, because TLS reads the five bytes of a header first and
// then the rest of the record. A connection has a buffer only while the buffer has
// unread bytes.
//
// Reads and writes use RawSyscall, because they never block. An ordinary system
// call wakes the runtime's monitor thread after idle time. On a quiet relay
// that happens for every packet and costs more than the call.
type socketListener struct {
	net.Listener
	first  firstFunc // may be nil
	places *places   // nil accepts every connection
}

// firstFunc is called with the first bytes that a connection has received, before
// the reader gets them.
type firstFunc = func(first []byte, peer net.Addr)

// Accept implements [net.Listener]. It closes connections that get no place.
func (l socketListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		tcp, ok := conn.(*net.TCPConn)
		if !ok {
			return conn, nil
		}
		raw, err := tcp.SyscallConn()
		if err != nil {
			return conn, nil
		}
		c := &socketConn{Conn: conn, raw: raw, first: l.first, places: l.places}
		c.fillFunc, c.drainFunc = c.fill, c.drain // allocated once, not for each call
		if l.places.take(c) {
			return c, nil
		}
		c.abort()
	}
}

// socketConn is a TCP connection. It embeds an interface, since
// [net.TCPConn.WriteTo] would bypass the buffer.
type socketConn struct {
	net.Conn
	raw                 syscall.RawConn
	fillFunc, drainFunc func(fd uintptr) bool
	turn                connTurn // of the TLS handshake; nil after it

	mu       sync.Mutex           // held by one reader
	buffer   *[readAheadSize]byte // nil when empty; guarded by mu
	from, to uint16               // unread bytes of buffer; guarded by mu
	probes   int32                // HTTP probes so far; owned by the HTTP server
	errno    syscall.Errno        // error of the last fill, or zero; guarded by mu
	first    firstFunc            // nil after the first fill; guarded by mu

	writeMu    sync.Mutex    // held by one writer
	unsent     []byte        // unsent bytes of the write; guarded by writeMu
	writeErrno syscall.Errno // error of the last drain, or zero; guarded by writeMu

	places *places // nil: none are counted
	place  place   // guarded by places.mu
}

// socketOf returns the TCP connection below the other layers of a connection, or nil.
func socketOf(conn net.Conn) *socketConn {
	for {
		switch c := conn.(type) {
		case *socketConn:
			return c
		case webSocket:
			conn = c.below
		case interface{ NetConn() net.Conn }:
			conn = c.NetConn()
		default:
			return nil
		}
	}
}

// NetConn returns the TCP connection below, as [crypto/tls.Conn.NetConn] does.
func (c *socketConn) NetConn() net.Conn { return c.Conn }

// SyscallConn implements [syscall.Conn].
func (c *socketConn) SyscallConn() (syscall.RawConn, error) { return c.raw, nil }

// CloseWrite ends the writing side, as [net.TCPConn.CloseWrite] does. The HTTP
// server calls it after a response to a request that it has not read in full.
// Closing the connection at once would reset it, and the client could lose the
// response.
func (c *socketConn) CloseWrite() error { return closeWrite(c.Conn) }

// Close implements [net.Conn]. It gives back the place of the connection. A handshake
// that waits for its turn then finds the connection closed.
func (c *socketConn) Close() error {
	err := c.Conn.Close()
	c.turn.close()
	c.places.give(c)
	return err
}

// abort closes the connection with a reset. The kernel then keeps nothing of it, as it
// would for a minute after a close.
func (c *socketConn) abort() {
	if tcp, ok := c.Conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}

// isGone reports whether the peer has closed or reset the connection, even if bytes from
// it are unread, or the relay has closed it.
func (c *socketConn) isGone() bool {
	gone := false
	err := c.raw.Control(func(fd uintptr) { gone = hungUp(fd) })
	return err != nil || gone
}

// hasRoom reports whether a short write to the client would not wait.
func (s *session) hasRoom() bool {
	c := socketOf(s.below)
	if c == nil {
		return true
	}
	full := false
	err := c.raw.Control(func(fd uintptr) {
		polled := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		n, err := unix.Poll(polled, 0)
		full = err == nil && n == 0
	})
	return err != nil || !full
}

func closeWrite(conn net.Conn) error {
	if c, ok := conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return nil
}

// Read implements [net.Conn].
func (c *socketConn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.buffer == nil {
		if c.turn.Load() != nil {
			c.turn.giveBack() // the handshake waits for the client
		}
		if len(p) == 0 || len(p) >= readAheadSize {
			return c.Conn.Read(p)
		}
		if err := c.raw.Read(c.fillFunc); err != nil {
			return 0, named(err, "read")
		}
		if c.errno != 0 {
			return 0, c.failed("read", c.errno)
		}
		if c.buffer == nil {
			return 0, io.EOF
		}
		if first := c.first; first != nil {
			c.first = nil
			c.places.touch(c)
			first(c.buffer[:c.to], c.RemoteAddr())
		}
	}
	n := copy(p, c.buffer[c.from:c.to])
	c.from += uint16(n)
	if c.from == c.to {
		c.release()
	}
	return n, nil
}

// fill reads the available bytes. If there are none, fill releases the buffer and
// returns false. The poller calls fill again when bytes arrive.
func (c *socketConn) fill(fd uintptr) bool {
	c.buffer = readAheadBuffers.Get().(*[readAheadSize]byte)
	n, errno := rawRead(fd, c.buffer[:])
	c.errno = 0
	if n > 0 {
		c.from, c.to = 0, uint16(n)
		return true
	}
	c.release()
	if errno == unix.EAGAIN {
		return false
	}
	c.errno = errno
	return true
}

func (c *socketConn) release() {
	readAheadBuffers.Put(c.buffer)
	c.buffer = nil
}

// Write implements [net.Conn].
func (c *socketConn) Write(p []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	c.unsent, c.writeErrno = p, 0
	err := c.raw.Write(c.drainFunc)
	n := len(p) - len(c.unsent)
	c.unsent = nil
	if err != nil {
		return n, named(err, "write")
	}
	if c.writeErrno != 0 {
		return n, c.failed("write", c.writeErrno)
	}
	return n, nil
}

// drain writes unsent until the socket is full, and then returns false. The
// poller calls drain again when there is room.
func (c *socketConn) drain(fd uintptr) bool {
	for len(c.unsent) > 0 {
		n, errno := rawWrite(fd, c.unsent)
		switch errno {
		case 0:
			c.unsent = c.unsent[n:]
		case unix.EAGAIN:
			c.turn.giveBack()
			return false
		default:
			c.writeErrno = errno
			return true
		}
	}
	return true
}

func (c *socketConn) failed(op string, errno syscall.Errno) error {
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: os.NewSyscallError(op, errno)}
}

// named gives an error of a [syscall.RawConn] the operation read or write, in
// place of raw-read or raw-write.
func named(err error, op string) error {
	if e, ok := errors.AsType[*net.OpError](err); ok {
		e.Op = op
	}
	return err
}
