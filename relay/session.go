package relay

import (
	"bufio"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"tailscale.com/derp"
	"tailscale.com/net/netutil"
	"tailscale.com/tstime/mono"
	"tailscale.com/types/key"

	"derpd/internal/caught"
)

// greetingLength is the length of a client's first bytes up to its key.
const greetingLength = derp.FrameHeaderLen + derp.KeyLen

// session is the hijacked connection of one client. It joins the writes of
// derpserver, follows the client's frames, and notes how the connection ended.
//
// One goroutine reads. One goroutine at a time writes. Any goroutine may close.
type session struct {
	net.Conn // below, after the bytes that the HTTP server has read
	below    net.Conn
	client   net.Addr // by the PROXY header or X-Forwarded-For, or else the peer
	started  mono.Time
	all      *sessions

	in    incoming              // owned by the reader
	paced atomic.Pointer[paced] // nil without a rate; changed under mu

	mu   sync.Mutex
	node key.NodePublic // zero until the client has sent its key; guarded by mu
	end  error          // nil while open; io.EOF: closed by the client; net.ErrClosed: by this relay; guarded by mu

	writeMu  sync.Mutex // held by one writer
	out      joiner     // guarded by writeMu
	admitted bool       // whether derpserver has answered the client; guarded by writeMu
	writeErr error      // sticky write error, returned by every later Write; guarded by writeMu
	told     string     // text of the last [Relay.Tell]; guarded by writeMu
	backlog  *backlog   // nil until admitted; set with writeMu and sessions.mu

	deadlineMu sync.Mutex
	deadline   time.Time // write deadline of below; guarded by deadlineMu
}

// newSession returns the session of a hijacked connection. The client's first
// bytes may be in buffered, which may be nil.
func newSession(all *sessions, conn net.Conn, buffered *bufio.Reader, client net.Addr) *session {
	s := &session{Conn: conn, below: conn, client: client, started: mono.Now(), all: all}
	if buffered != nil && buffered.Buffered() > 0 {
		s.Conn = netutil.NewDrainBufConn(conn, buffered)
	}
	if all.keepsFirst() {
		s.Conn = &firstBytes{Conn: s.Conn}
	}
	return s
}

// NetConn returns the connection below, as [crypto/tls.Conn.NetConn] does.
// derpserver unwraps connections with it, down to the TCP connection.
func (s *session) NetConn() net.Conn { return s.below }

// RemoteAddr returns the address of the client.
func (s *session) RemoteAddr() net.Addr { return s.client }

// Read implements [net.Conn].
func (s *session) Read(p []byte) (int, error) {
	n, err := s.read(p)
	if s.paced.Load() != nil && err == nil {
		if err = s.pause(n); err != nil {
			n = 0
		}
	}
	if err != nil {
		s.unread()
		s.ended(err)
	}
	return n, err
}

// errPanic ends a session in which derpd has a bug.
var errPanic = errors.New("a panic, which the log describes")

// Write implements [net.Conn]. It may return the error of an earlier write. A panic
// ends the connection: derpserver writes on a goroutine whose panic would end the
// process.
//
// The stack is deepest below this method. With some tens of bytes more in its frame,
// the goroutine of each client would need a stack of 8 KiB in place of 4.
func (s *session) Write(p []byte) (n int, err error) {
	s.writeMu.Lock()
	defer s.written(&err)
	inside := s.out.follow(p)
	if !s.admitted && s.out.answered() {
		s.admitted = true
		s.all.admitted(s)
	}
	for rest := p; len(rest) > 0 && s.writeErr == nil; {
		var send []byte
		if send, rest = s.out.next(rest, inside); send != nil {
			_, s.writeErr = s.below.Write(send)
			s.out.sent()
		}
	}
	if s.writeErr != nil {
		return 0, s.writeErr
	}
	return len(p), nil
}

// written ends a Write, which defers it. After a panic it sets err.
func (s *session) written(err *error) {
	if v := recover(); v != nil {
		caught.Panic(s.all.log, "write to a client", v)
		s.writeErr, *err = errPanic, errPanic
		_ = s.below.Close()
	}
	if *err != nil {
		s.ended(*err)
	}
	if size := s.out.frames.large; size > 0 {
		s.out.frames.large = 0
		s.all.unqueue(s.backlog, int(size))
	}
	s.writeMu.Unlock()
}

// Close implements [net.Conn]. The connection of a client that was just refused
// is held; see [teller]. Otherwise Close ends a running write and does not wait.
func (s *session) Close() error {
	if s.all.teller.hold(s) {
		return nil
	}
	return s.close()
}

// close closes the connection. The bytes that the joiner holds are discarded: they
// end inside a frame, and are useless to the client. A client whose socket is full gets
// no closing message of TLS, which would wait for five seconds.
func (s *session) close() error {
	s.ended(net.ErrClosed)
	if !s.hasRoom() {
		_ = socketOf(s.below).Close()
	}
	err := s.below.Close()
	s.all.remove(s)
	return err
}

// ended notes the first cause of the end.
func (s *session) ended(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.end != nil {
		return
	}
	s.end = cause
	if p := s.paced.Load(); p != nil {
		close(p.ended)
	}
}

// state returns the client's key, or zero, and how the session ended, or nil.
func (s *session) state() (node key.NodePublic, end error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.node, s.end
}

const (
	// writeTimeout is the time in which a write to a client must end. It equals
	// TCP_USER_TIMEOUT, so that a client whose link stalls for ten seconds stays
	// connected. derper's two seconds are for a kernel that takes megabytes.
	// derpserver has its own timeout for the other nodes of a mesh, 30 seconds.
	writeTimeout = 15 * time.Second

	// deadlineStep is the longest delay of a write deadline.
	deadlineStep = time.Second
)

// SetWriteDeadline implements [net.Conn]. A write may time out up to deadlineStep
// late, and never early. derpserver moves the deadline with each packet, and each
// move costs a timer.
func (s *session) SetWriteDeadline(t time.Time) error {
	s.deadlineMu.Lock()
	defer s.deadlineMu.Unlock()
	if later := s.deadline.Sub(t); later >= 0 && later <= deadlineStep {
		return nil
	}
	s.deadline = t
	if !t.IsZero() {
		s.deadline = t.Add(deadlineStep)
	}
	return s.below.SetWriteDeadline(s.deadline)
}

// SetDeadline implements [net.Conn].
func (s *session) SetDeadline(t time.Time) error {
	s.deadlineMu.Lock()
	defer s.deadlineMu.Unlock()
	s.deadline = t
	return s.below.SetDeadline(t)
}
