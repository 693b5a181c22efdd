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

// ReadAhead makes a listener whose TCP connections take from the socket what
// is there, in one system call, when TLS asks for a few bytes of it. A
// connection holds a buffer only while there is something in it.
func ReadAhead(l net.Listener) net.Listener { return readAheadListener{l} }

type readAheadListener struct{ net.Listener }

// Accept implements [net.Listener].
func (l readAheadListener) Accept() (net.Conn, error) {
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
	c := &readAheadConn{Conn: conn, raw: raw}
	c.fillFunc = c.fill // allocated once, not with each read
	return c, nil
}

// readAheadConn embeds an interface: of the methods of [net.TCPConn], WriteTo
// would go by the buffer.
type readAheadConn struct {
	net.Conn
	raw      syscall.RawConn
	fillFunc func(fd uintptr) bool

	mu     sync.Mutex           // held by one reader
	buffer *[readAheadSize]byte // nil when empty; guarded by mu
	unread []byte               // the rest of what is in buffer; guarded by mu
	err    error                // of the last fill; guarded by mu
}

// NetConn is the TCP connection below, as [crypto/tls.Conn.NetConn] is.
func (c *readAheadConn) NetConn() net.Conn { return c.Conn }

// SyscallConn implements [syscall.Conn].
func (c *readAheadConn) SyscallConn() (syscall.RawConn, error) { return c.raw, nil }

// Read implements [net.Conn].
func (c *readAheadConn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.unread) == 0 {
		if len(p) == 0 || len(p) >= readAheadSize {
			return c.Conn.Read(p)
		}
		if err := c.raw.Read(c.fillFunc); err != nil {
			if op, ok := errors.AsType[*net.OpError](err); ok {
				op.Op = "read" // for logs, in place of raw-read
			}
			return 0, err
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
func (c *readAheadConn) fill(fd uintptr) bool {
	c.buffer = readAheadBuffers.Get().(*[readAheadSize]byte)
	n, err := unix.Read(int(fd), c.buffer[:])
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Read(int(fd), c.buffer[:])
	}
	c.err = nil
	if n > 0 {
		c.unread = c.buffer[:n]
		return true
	}
	c.release()
	switch {
	case errors.Is(err, unix.EAGAIN):
		return false
	case err == nil:
		c.err = io.EOF
	default:
		c.err = &net.OpError{Op: "read", Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: os.NewSyscallError("read", err)}
	}
	return true
}

func (c *readAheadConn) release() {
	readAheadBuffers.Put(c.buffer)
	c.buffer, c.unread = nil, nil
}
