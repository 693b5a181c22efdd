package relay

import (
	"bufio"
	"net"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// batchSize is one TLS record (RFC 8446 §5.1).
	batchSize = 16 << 10

	// chunkSize divides the buffers through which derpserver writes: its own
	// have 2 KiB, those that it was handed at some time have bufio's 4 KiB.
	chunkSize    = 2 << 10
	longestChunk = 4 << 10

	// batchDelay is between two looks at the batches that are under way. One
	// that nothing was added to from one look to the next is sent. It is long,
	// since the first look after a quiet time wakes a thread, and hardly ever
	// matters: with WireGuard's messages, whose length is a multiple of 16,
	// frames are of odd length, and no batch of them ends with the buffer.
	batchDelay = 5 * time.Millisecond

	// closePatience is how long Close waits for a batch that is being sent
	// late, which nobody else waits for.
	closePatience = 100 * time.Millisecond

	// deadlineStep is how much later than asked a write may time out.
	deadlineStep = time.Second
)

// batchBuffers holds *[batchSize]byte.
var batchBuffers = sync.Pool{New: func() any { return new([batchSize]byte) }}

// batches owns the batches that are under way on all connections of a relay.
// Its timer runs only while there are some.
type batches struct {
	mu    sync.Mutex
	conns []*batchConn // whose watched is true; guarded by mu
	timer *time.Timer  // nil until first needed; guarded by mu
}

// watch makes sure that a batch will be looked at. c.mu is locked.
func (b *batches) watch(c *batchConn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conns = append(b.conns, c)
	switch {
	case len(b.conns) > 1: // the timer is running
	case b.timer == nil:
		b.timer = time.AfterFunc(batchDelay, b.look)
	default:
		b.timer.Reset(batchDelay)
	}
}

// look sends what was left, and forgets the connections that hold nothing.
func (b *batches) look() {
	b.mu.Lock()
	defer b.mu.Unlock()
	watched := b.conns[:0]
	for _, c := range b.conns {
		if c.look() {
			watched = append(watched, c)
		}
	}
	clear(b.conns[len(watched):])
	b.conns = watched
	if len(watched) > 0 {
		b.timer.Reset(batchDelay)
	}
}

// joinWrites hands next connections that join what derpserver writes.
func (b *batches) joinWrites(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(batchWriter{w, b}, r)
	})
}

// batchWriter is an [http.ResponseWriter] whose connection is a batchConn.
type batchWriter struct {
	http.ResponseWriter
	batches *batches
}

// Hijack implements [http.Hijacker].
func (w batchWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, brw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	return &batchConn{Conn: conn, batches: w.batches}, brw, nil
}

// batchConn joins the chunks of one batch of derpserver's writes, each of which
// would become a TLS record and a system call.
//
// derpserver writes frames through a small buffer that is flushed when it is
// full, in the middle of a frame, and at the end of each batch. So a chunk as
// long as the buffer is followed by more, and any other one is the last of its
// batch, or a frame that went by the buffer. The exception is a batch that ends
// with the buffer; [batches] takes care of that one.
//
// A connection holds a buffer only while a batch is under way.
type batchConn struct {
	net.Conn
	batches *batches

	mu      sync.Mutex
	batch   *[batchSize]byte // nil when nothing is held; guarded by mu
	length  int              // of what is held; guarded by mu
	err     error            // of a write that nobody was told of, and since then of all; guarded by mu
	watched bool             // by batches; guarded by mu
	looked  int              // length at the last look, 0 if that was of another batch; guarded by mu

	looking atomic.Bool                   // while look runs
	late    atomic.Pointer[chan struct{}] // closed when the batch that is sent late was; nil if there is none

	deadlineMu sync.Mutex
	asked, set time.Time // the write deadline as asked for, and as it is; guarded by deadlineMu
}

// NetConn is the connection below, as [crypto/tls.Conn.NetConn] is: derpserver
// looks there for the TCP connection whose round trip times it counts.
func (c *batchConn) NetConn() net.Conn { return c.Conn }

// Write implements [net.Conn]. An error may be that of an earlier write.
func (c *batchConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, c.err
	}
	more := len(p) == chunkSize || len(p) == longestChunk
	if c.length > 0 && c.length+len(p) > batchSize {
		if err := c.flush(); err != nil {
			return 0, err
		}
	}
	if c.length == 0 && !more {
		return c.Conn.Write(p)
	}
	if c.batch == nil {
		c.batch, c.looked = batchBuffers.Get().(*[batchSize]byte), 0
	}
	c.length += copy(c.batch[c.length:], p)
	if !more || c.length == batchSize {
		if err := c.flush(); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	if !c.watched {
		c.watched = true
		c.batches.watch(c)
	}
	return len(p), nil
}

// flush sends what is held. c.mu is locked.
func (c *batchConn) flush() error {
	if c.batch == nil {
		return c.err
	}
	_, c.err = c.Conn.Write(c.batch[:c.length])
	batchBuffers.Put(c.batch)
	c.batch, c.length = nil, 0
	return c.err
}

// look sends what was left, and reports whether to look again.
func (c *batchConn) look() bool {
	c.looking.Store(true)
	defer c.looking.Store(false)
	if c.late.Load() != nil || !c.mu.TryLock() {
		return true // is being written to
	}
	defer c.mu.Unlock()
	if c.batch != nil && c.length == c.looked {
		// Not here: this may block, and others wait for their look.
		done := make(chan struct{})
		c.late.Store(&done)
		go c.sendLate(done)
		return true
	}
	c.looked = c.length
	c.watched = c.batch != nil
	return c.watched
}

func (c *batchConn) sendLate(done chan struct{}) {
	defer close(done)
	defer c.late.Store(nil)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.batch != nil && c.flush() != nil {
		_ = c.Conn.Close() // as derpserver does after a failed write
	}
}

// Close implements [net.Conn]. What is held is sent before, unless a write is
// under way, which Close is there to end.
func (c *batchConn) Close() error {
	// The second time if a look or a late batch was in the way at first.
	for range 2 {
		if c.mu.TryLock() {
			err := c.flush()
			if c.err == nil {
				c.err = net.ErrClosed
			}
			c.mu.Unlock()
			if closeErr := c.Conn.Close(); closeErr != nil {
				return closeErr
			}
			return err
		}
		for c.looking.Load() {
			runtime.Gosched() // takes no longer than a few instructions
		}
		if late := c.late.Load(); late != nil {
			_ = c.Conn.SetWriteDeadline(time.Now().Add(closePatience))
			<-*late
		}
	}
	return c.Conn.Close()
}

// SetDeadline implements [net.Conn].
func (c *batchConn) SetDeadline(t time.Time) error {
	c.deadlineMu.Lock()
	defer c.deadlineMu.Unlock()
	c.asked, c.set = t, t
	return c.Conn.SetDeadline(t)
}

// SetWriteDeadline implements [net.Conn]. A write may time out up to a second
// later than asked, never earlier: derpserver moves the deadline with each
// packet, and each time costs a timer.
func (c *batchConn) SetWriteDeadline(t time.Time) error {
	c.deadlineMu.Lock()
	defer c.deadlineMu.Unlock()
	forward := !t.Before(c.asked)
	c.asked = t
	switch {
	case t.IsZero() || !forward:
		c.set = t
	case !t.After(c.set) && c.set.Sub(t) <= deadlineStep:
		return nil
	case t.After(time.Now()):
		c.set = t.Add(deadlineStep)
	default:
		c.set = t
	}
	return c.Conn.SetWriteDeadline(c.set)
}
