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

// readAheadSize is one TLS record and the header of the next, with room for
// what else has arrived.
const readAheadSize = 32 << 10

// readAheadBuffers holds *[readAheadSize]byte.
var readAheadBuffers = sync.Pool{New: func() any { return new([readAheadSize]byte) }}

// Sockets makes a listener whose TCP connections use their sockets with less
// work than those of package net.
//
// They take from the socket what is there, in one system call, when TLS asks
// for a few bytes of it. A connection holds a buffer only while there is
// something in it.
//
// And they do not tell Go's scheduler of system calls that return at once, as
// those of a socket that does not block do. It would wake a thread, which looks
// after calls that take long, each time the process has been idle: with little
// to relay that is for each packet, and costs more than the calls themselves.
func Sockets(l net.Listener) net.Listener { return socketListener{l} }

type socketListener struct{ net.Listener }

// Accept implements [net.Listener].
func (l socketListener) Accept() (net.Conn, error) {
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
	c := &socketConn{Conn: conn, raw: raw}
	c.fillFunc, c.drainFunc = c.fill, c.drain // allocated once, not with each call
	return c, nil
}

// socketConn embeds an interface: of the methods of [net.TCPConn], WriteTo
// would go by the buffer.
type socketConn struct {
	net.Conn
	raw                 syscall.RawConn
	fillFunc, drainFunc func(fd uintptr) bool

	mu     sync.Mutex           // held by one reader
	buffer *[readAheadSize]byte // nil when empty; guarded by mu
	unread []byte               // the rest of what is in buffer; guarded by mu
	err    error                // of the last fill; guarded by mu

	writeMu  sync.Mutex // held by one writer
	unsent   []byte     // the rest of what is written; guarded by writeMu
	writeErr error      // of the last drain; guarded by writeMu
}

// NetConn is the TCP connection below, as [crypto/tls.Conn.NetConn] is.
func (c *socketConn) NetConn() net.Conn { return c.Conn }

// SyscallConn implements [syscall.Conn].
func (c *socketConn) SyscallConn() (syscall.RawConn, error) { return c.raw, nil }

// Read implements [net.Conn].
func (c *socketConn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.unread) == 0 {
		if len(p) == 0 || len(p) >= readAheadSize {
			return c.Conn.Read(p)
		}
		if err := c.raw.Read(c.fillFunc); err != nil {
			return 0, named(err, "read")
		}
		if c.err != nil {
			return 0, c.err
		}
	}
	n := copy(p, c.unread)
	c.unread = c.unread[n:]
	if len(c.unread) == 0 {
		c.release()
	}
	return n, nil
}

// fill reads what is there. It returns false, and holds no buffer, if that is
// nothing yet: then it is called again when there is something.
func (c *socketConn) fill(fd uintptr) bool {
	c.buffer = readAheadBuffers.Get().(*[readAheadSize]byte)
	n, errno := rawRead(fd, c.buffer[:])
	c.err = nil
	if n > 0 {
		c.unread = c.buffer[:n]
		return true
	}
	c.release()
	switch errno {
	case unix.EAGAIN:
		return false
	case 0:
		c.err = io.EOF
	default:
		c.err = c.failed("read", errno)
	}
	return true
}

func (c *socketConn) release() {
	readAheadBuffers.Put(c.buffer)
	c.buffer, c.unread = nil, nil
}

// Write implements [net.Conn].
func (c *socketConn) Write(p []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	c.unsent, c.writeErr = p, nil
	err := c.raw.Write(c.drainFunc)
	n := len(p) - len(c.unsent)
	c.unsent = nil
	if err != nil {
		return n, named(err, "write")
	}
	return n, c.writeErr
}

// drain writes as much as there is room for. It returns false if something is
// left: then it is called again when there is room.
func (c *socketConn) drain(fd uintptr) bool {
	for len(c.unsent) > 0 {
		n, errno := rawWrite(fd, c.unsent)
		switch errno {
		case 0:
			c.unsent = c.unsent[n:]
		case unix.EAGAIN:
			return false
		default:
			c.writeErr = c.failed("write", errno)
			return true
		}
	}
	return true
}

func (c *socketConn) failed(op string, errno syscall.Errno) error {
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: os.NewSyscallError(op, errno)}
}

// named is an error of a [syscall.RawConn] as logs should have it.
func named(err error, op string) error {
	if e, ok := errors.AsType[*net.OpError](err); ok {
		e.Op = op // in place of raw-read
	}
	return err
}
