package accept

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"
)

// Config describes a [Listener].
type Config struct {
	// Name is that of the listener in logs.
	Name string

	// Highest is the highest descriptor that a connection may have; 0 is any. The
	// kernel gives out the lowest free descriptor. A higher one means that the
	// descriptors left are those kept for others, and the connection is closed.
	Highest int

	// Exempt reports whether a peer may have a higher descriptor. Nil exempts nobody.
	Exempt func(peer net.Addr) bool

	Log zerolog.Logger
}

// Listener is a TCP listener whose Accept fails only with an error that wraps
// [net.ErrClosed]. [net/http.Server] ends at most other errors.
type Listener struct {
	net.Listener
	config   Config
	failures *Failures
	failed   atomic.Uint64
	refused  atomic.Uint64

	closed chan struct{} // ends a pause
	close  func() error
}

// Listen returns ln with an Accept that retries.
func Listen(ln net.Listener, c Config) *Listener {
	l := &Listener{Listener: ln, config: c, failures: NewFailures(c.Name, c.Log), closed: make(chan struct{})}
	l.close = sync.OnceValue(func() error {
		close(l.closed)
		return ln.Close()
	})
	return l
}

// Accept implements [net.Listener].
func (l *Listener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil, err
		case err == nil && l.reserved(conn):
			_ = l.failures.Failed(syscall.EMFILE) // no pause: the next connection must not wait in the backlog
			l.refused.Add(1)
			_ = conn.Close()
		case err == nil:
			l.failures.Succeeded()
			return conn, nil
		default:
			l.failed.Add(1)
			select {
			case <-time.After(l.failures.Failed(err)):
			case <-l.closed:
				return nil, net.ErrClosed
			}
		}
	}
}

// reserved reports whether a connection has one of the descriptors kept for others.
func (l *Listener) reserved(conn net.Conn) bool {
	tcp, ok := conn.(syscall.Conn)
	if !ok || l.config.Highest == 0 {
		return false
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return false
	}
	above := false
	err = raw.Control(func(fd uintptr) { above = fd > uintptr(l.config.Highest) })
	return err == nil && above && (l.config.Exempt == nil || !l.config.Exempt(conn.RemoteAddr()))
}

// Close implements [net.Listener]. A second call has no effect.
func (l *Listener) Close() error { return l.close() }

// Name is that of the listener in logs and metrics.
func (l *Listener) Name() string { return l.config.Name }

// Failures is the number of errors of Accept since the start.
func (l *Listener) Failures() uint64 { return l.failed.Load() }

// Refused is the number of connections closed since the start for their descriptor.
func (l *Listener) Refused() uint64 { return l.refused.Load() }
