package relay

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"tailscale.com/net/tcpinfo"
)

// written is a connection that keeps each write.
type written struct {
	net.Conn // nil: what is not below is not used
	mu       sync.Mutex
	writes   [][]byte    // guarded by mu
	fail     error       // guarded by mu
	closed   bool        // guarded by mu
	set      []time.Time // write deadlines; guarded by mu
}

func (c *written) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fail != nil {
		return 0, c.fail
	}
	c.writes = append(c.writes, bytes.Clone(p))
	return len(p), nil
}

func (c *written) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	return nil
}

func (c *written) SetDeadline(t time.Time) error { return c.SetWriteDeadline(t) }

func (c *written) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.set = append(c.set, t)
	return nil
}

func (c *written) lengths() []int {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []int
	for _, p := range c.writes {
		list = append(list, len(p))
	}
	return list
}

func (c *written) bytes() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Concat(c.writes...)
}

// held is what a connection has not sent yet.
func (c *batchConn) held() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if (c.batch == nil) != (c.length == 0) {
		panic("a buffer without content, or the reverse")
	}
	return c.length
}

func random(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rand.Uint32())
	}
	return p
}

// What derpserver does with a batch, and what becomes of it.
func TestBatch(t *testing.T) {
	for name, tt := range map[string]struct {
		frames []int
		want   []int
	}{
		"nothing":                    {nil, nil},
		"a short frame":              {[]int{5}, []int{5}},
		"a packet":                   {[]int{1317}, []int{1317}},
		"eight packets":              {slices.Repeat([]int{1317}, 8), []int{10536}},
		"more than a record":         {slices.Repeat([]int{1317}, 32), []int{16384, 16384, 9376}},
		"goes by the buffer":         {[]int{8229}, []int{8229}},
		"go by the buffer":           {[]int{8229, 8229}, []int{8229, 8229}},
		"does not fit":               {slices.Concat(slices.Repeat([]int{2000}, 5), []int{60000}), []int{10240, 59760}},
		"short ones after long ones": {[]int{8229, 5, 5}, []int{8229, 10}},
	} {
		t.Run(name, func(t *testing.T) {
			// In a bubble, since a look is not to come between.
			synctest.Test(t, func(t *testing.T) {
				var below written
				conn := &batchConn{Conn: &below, batches: new(batches)}
				w := bufio.NewWriterSize(conn, chunkSize)
				var want []byte
				for _, length := range tt.frames {
					frame := random(length)
					want = append(want, frame...)
					if _, err := w.Write(frame); err != nil {
						t.Fatal(err)
					}
				}
				if err := w.Flush(); err != nil {
					t.Fatal(err)
				}
				if held := conn.held(); held != 0 {
					t.Errorf("%d bytes were kept back", held)
				}
				if got := below.lengths(); !slices.Equal(got, tt.want) {
					t.Errorf("writes of %v, want %v", got, tt.want)
				}
				if !bytes.Equal(below.bytes(), want) {
					t.Error("other bytes, or another order")
				}
			})
		})
	}
}

// A batch that ends exactly with derpserver's buffer waits for a look, and two
// at the most.
func TestBatchThatEndsWithBuffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var below written
		shared := new(batches)
		conn, idle := &batchConn{Conn: &below, batches: shared}, &batchConn{Conn: new(written), batches: shared}
		for _, longer := range []int{1, 3} {
			before := len(below.bytes())
			for range longer {
				if _, err := conn.Write(random(chunkSize)); err != nil {
					t.Fatal(err)
				}
				if got := len(below.bytes()); got != before {
					t.Fatalf("%d bytes were sent in the middle of a batch", got-before)
				}
				<-time.After(batchDelay / 2)
			}
			<-time.After(2 * batchDelay)
			synctest.Wait()
			if got, want := len(below.bytes())-before, longer*chunkSize; got != want || conn.held() != 0 {
				t.Fatalf("after %d chunks and two looks %d bytes were sent, want %d", longer, got, want)
			}
		}
		// Connections without a batch are not looked at, and then nothing is.
		if _, err := idle.Write(random(5)); err != nil {
			t.Fatal(err)
		}
		<-time.After(2 * batchDelay)
		synctest.Wait()
		shared.mu.Lock()
		defer shared.mu.Unlock()
		if len(shared.conns) != 0 || shared.timer.Stop() {
			t.Errorf("%d connections are looked at with nothing under way", len(shared.conns))
		}
	})
}

// One connection that takes nothing does not keep the others waiting.
func TestBatchOfStuckConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shared := new(batches)
		stuck, far := net.Pipe() // nobody reads
		defer func() { _ = far.Close() }()
		first := &batchConn{Conn: stuck, batches: shared}
		var below written
		second := &batchConn{Conn: &below, batches: shared}
		for _, conn := range []*batchConn{first, second} {
			if _, err := conn.Write(random(chunkSize)); err != nil {
				t.Fatal(err)
			}
		}
		<-time.After(3 * batchDelay)
		synctest.Wait()
		if got := len(below.bytes()); got != chunkSize {
			t.Errorf("%d bytes were sent, want %d", got, chunkSize)
		}
		// And closing it does not wait for long, and tells that it was lost.
		start := time.Now()
		if err := first.Close(); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) > closePatience {
			t.Errorf("closed after %s: %v", time.Since(start), err)
		}
		if _, err := first.Write(random(1)); err == nil {
			t.Error("a write after Close succeeded")
		}
	})
}

func TestBatchWriteFails(t *testing.T) {
	broken := errors.New("broken")
	t.Run("at once", func(t *testing.T) {
		conn := &batchConn{Conn: &written{fail: broken}, batches: new(batches)}
		if _, err := conn.Write(random(5)); !errors.Is(err, broken) {
			t.Error(err)
		}
	})
	t.Run("at the end of the batch, and after it", func(t *testing.T) {
		conn := &batchConn{Conn: &written{fail: broken}, batches: new(batches)}
		if _, err := conn.Write(random(chunkSize)); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := conn.Write(random(5)); !errors.Is(err, broken) {
				t.Error(err)
			}
		}
		if conn.held() != 0 {
			t.Error("a broken connection holds a buffer")
		}
	})
	t.Run("with nobody there", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			below := &written{fail: broken}
			conn := &batchConn{Conn: below, batches: new(batches)}
			if _, err := conn.Write(random(chunkSize)); err != nil {
				t.Fatal(err)
			}
			<-time.After(3 * batchDelay)
			synctest.Wait()
			if _, err := conn.Write(random(chunkSize)); !errors.Is(err, broken) {
				t.Errorf("the next write: %v, want %v", err, broken)
			}
			below.mu.Lock()
			defer below.mu.Unlock()
			if !below.closed {
				t.Error("the connection is still open, and its reader knows nothing")
			}
		})
	})
}

func TestBatchClose(t *testing.T) {
	var below written
	conn := &batchConn{Conn: &below, batches: new(batches)}
	want := random(chunkSize)
	if _, err := conn.Write(want); err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(below.bytes(), want) || !below.closed || conn.held() != 0 {
		t.Error("what was held was not sent before closing")
	}
	if _, err := conn.Write(want); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a write after Close: %v", err)
	}
	if conn.held() != 0 {
		t.Error("a closed connection holds a buffer")
	}
}

// Close ends a write that is stuck, as derpserver needs it to.
func TestBatchCloseEndsWrite(t *testing.T) {
	near, far := net.Pipe()
	defer func() { _ = far.Close() }()
	conn := &batchConn{Conn: near, batches: new(batches)}
	failed := make(chan error)
	go func() {
		_, err := conn.Write(random(5))
		failed <- err
	}()
	if _, err := far.Read(make([]byte, 1)); err != nil { // it has begun
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	if err := <-failed; err == nil {
		t.Error("the write succeeded")
	}
}

func TestBatchAllocatesNothing(t *testing.T) {
	conn := &batchConn{Conn: discard{}, batches: new(batches)}
	chunk := random(chunkSize)
	if got := testing.AllocsPerRun(1000, func() {
		for range 5 {
			_, _ = conn.Write(chunk)
		}
		_, _ = conn.Write(chunk[:100])
	}); got != 0 {
		t.Errorf("%v allocations for a batch", got)
	}
	if conn.held() != 0 {
		t.Error("an idle connection holds a buffer")
	}
}

type discard struct{ net.Conn }

func (discard) Write(p []byte) (int, error) { return len(p), nil }

func TestWriteDeadline(t *testing.T) {
	var below written
	conn := &batchConn{Conn: &below, batches: new(batches)}
	now := time.Now()
	at := func(d time.Duration) time.Time { return now.Add(time.Hour).Add(d) }
	for i, step := range []struct {
		set  func(time.Time) error
		t    time.Time
		want time.Time // zero: stays as it was
	}{
		{conn.SetWriteDeadline, at(0), at(deadlineStep)},
		{conn.SetWriteDeadline, at(time.Millisecond), time.Time{}},
		{conn.SetWriteDeadline, at(deadlineStep), time.Time{}},
		{conn.SetWriteDeadline, at(deadlineStep + 1), at(2*deadlineStep + 1)},
		{conn.SetWriteDeadline, at(0), at(0)}, // backward
		{conn.SetWriteDeadline, now, now},     // now: to end what is under way
		{conn.SetWriteDeadline, at(5), at(5 + deadlineStep)},
		{conn.SetDeadline, at(7), at(7)},
		{conn.SetWriteDeadline, at(7), time.Time{}},
		{conn.SetWriteDeadline, at(8), at(8 + deadlineStep)},
	} {
		before := len(below.set)
		if err := step.set(step.t); err != nil {
			t.Fatal(err)
		}
		got := below.set[before:]
		if step.want.IsZero() && len(got) != 0 || !step.want.IsZero() && (len(got) != 1 || !got[0].Equal(step.want)) {
			t.Errorf("step %d: the deadline below became %v, want %v", i, got, step.want)
		}
	}
	// None at all is none.
	if err := conn.SetWriteDeadline(time.Time{}); err != nil || !below.set[len(below.set)-1].IsZero() {
		t.Errorf("the deadline was not taken away: %v", below.set[len(below.set)-1])
	}
}

// pair is the two ends of a TCP connection; the first was accepted by l, which
// is closed with them.
func pair(t testing.TB, wrap func(net.Listener) net.Listener) (accepted net.Conn, far *net.TCPConn) {
	t.Helper()
	inner, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := wrap(inner)
	defer func() { _ = l.Close() }()
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if accepted, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = accepted.Close() })
	return accepted, conn.(*net.TCPConn)
}

func plain(l net.Listener) net.Listener { return l }

func TestSocketHoldsNothing(t *testing.T) {
	conn, far := pair(t, Sockets)
	c := conn.(*socketConn)
	holds := func(want bool) {
		t.Helper()
		if got := c.buffer != nil; got != want {
			t.Errorf("holds a buffer: %v, want %v", got, want)
		}
	}
	// Nothing is there: it waits without a buffer.
	if err := c.raw.Control(func(fd uintptr) {
		if c.fill(fd) {
			t.Error("read something from an empty socket")
		}
	}); err != nil {
		t.Fatal(err)
	}
	holds(false)

	sent := random(1000)
	if _, err := far.Write(sent); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 1000)
	for i, size := range []int{5, 95, 900} {
		from := []int{0, 5, 100}[i]
		if _, err := io.ReadFull(c, got[from:from+size]); err != nil {
			t.Fatal(err)
		}
		holds(size != 900)
	}
	if !bytes.Equal(got, sent) {
		t.Error("other bytes, or another order")
	}
	if err := far.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(got); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	holds(false)
}

// reset ends a connection as one does that has crashed.
func reset(t *testing.T, c *net.TCPConn) {
	t.Helper()
	if err := errors.Join(c.SetLinger(0), c.Close()); err != nil {
		t.Fatal(err)
	}
}

// Errors are those of a connection that is not wrapped.
func TestSocketErrors(t *testing.T) {
	c, far := pair(t, Sockets)
	if err := c.SetReadDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: %v", err)
	}
	if err := c.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	reset(t, far)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("after a reset: %v", err)
	} else if _, ok := errors.AsType[*net.OpError](err); !ok {
		t.Errorf("%T, want a *net.OpError", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// What does not fit into the socket is sent when there is room, whole writes
// one after the other.
func TestSocketWrites(t *testing.T) {
	conn, far := pair(t, Sockets)
	const writers, each = 4, 3 << 20 // more than the buffers of both sides
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			if n, err := conn.Write(bytes.Repeat([]byte{byte(i)}, each)); n != each || err != nil {
				t.Errorf("%d of %d bytes, %v", n, each, err)
			}
		})
	}
	got := make([]byte, writers*each)
	if _, err := io.ReadFull(far, got); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	for of := range slices.Chunk(got, each) {
		if !bytes.Equal(of, bytes.Repeat(of[:1], each)) {
			t.Fatal("a write has another one in it")
		}
	}
	if n, err := conn.Write(nil); n != 0 || err != nil {
		t.Errorf("nothing: %d, %v", n, err)
	}
}

// A write that fails says how much was sent, and why as one that is not wrapped.
func TestSocketWriteErrors(t *testing.T) {
	conn, far := pair(t, Sockets)
	tooMuch := make([]byte, 64<<20)
	if err := conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	sent, err := conn.Write(tooMuch) // nobody reads
	if sent == 0 || sent == len(tooMuch) || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: %d, %v", sent, err)
	}
	if e, ok := errors.AsType[*net.OpError](err); !ok || e.Op != "write" {
		t.Errorf("%#v, want a *net.OpError of a write", err)
	}
	if _, err := io.ReadFull(far, make([]byte, sent)); err != nil {
		t.Error(err)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	reset(t, far)
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("after a reset: %v", err)
	}
	if _, err := conn.Write([]byte{1}); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("after a reset: %v", err)
	} else if e, ok := errors.AsType[*net.OpError](err); !ok || e.Op != "write" {
		t.Errorf("%#v, want a *net.OpError of a write", err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte{1}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// derpserver finds the TCP connection through all that is wrapped around it,
// to ask the kernel for its round trip time.
func TestRTT(t *testing.T) {
	conn, _ := pair(t, Sockets)
	server := tls.Server(conn, new(tls.Config))
	hijacked := httptest.NewRecorder()
	for name, w := range map[string]http.ResponseWriter{
		"native": batchWriter{hijacker{hijacked, server}, new(batches)},
	} {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Fatal(err)
		}
		if rtt, err := tcpinfo.RTT(conn); err != nil || rtt <= 0 {
			t.Errorf("%s: %v, %v", name, rtt, err)
		}
	}
	if _, ok := conn.(syscall.Conn); !ok {
		t.Error("the socket cannot be reached")
	}
}

// hijacker hands conn over.
type hijacker struct {
	http.ResponseWriter
	conn net.Conn
}

func (h hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return h.conn, bufio.NewReadWriter(bufio.NewReader(h.conn), bufio.NewWriter(h.conn)), nil
}

// Operations of a script.
const (
	opWrite = iota // what derpserver writes, without a flush
	opFlush
	opDirect // a write that goes by derpserver's buffer
	opPause  // longer than a batch may be held
	opDeadline
	opRead
	operations
)

// script runs operations, three bytes each, on one end of a connection whose
// other end sends received; it returns what either end got.
func script(t *testing.T, ops []byte, received []byte, near net.Conn, far *net.TCPConn) (atNear, atFar []byte) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = far.Write(received) })
	var farErr error
	wg.Go(func() { atFar, farErr = io.ReadAll(far) })

	w := bufio.NewWriterSize(near, chunkSize)
	next := byte(0)
	content := func(n int) []byte {
		p := make([]byte, n)
		for i := range p {
			p[i] = next
			next = next*5 + 3 // repeats only after 256
		}
		return p
	}
	for len(ops) >= 3 {
		op, n := ops[0]%operations, int(binary.BigEndian.Uint16(ops[1:]))
		ops = ops[3:]
		var err error
		switch op {
		case opWrite:
			_, err = w.Write(content(n % 5000))
		case opFlush:
			err = w.Flush()
		case opDirect:
			if err = w.Flush(); err == nil {
				_, err = near.Write(content(n))
			}
		case opPause:
			<-time.After(batchDelay / 2 * time.Duration(n%4))
		case opDeadline:
			err = near.SetWriteDeadline(time.Now().Add(time.Minute + time.Duration(n)*time.Millisecond))
		case opRead:
			p := make([]byte, min(n, len(received)-len(atNear)))
			_, err = io.ReadFull(near, p)
			atNear = append(atNear, p...)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	rest := make([]byte, len(received)-len(atNear))
	if _, err := io.ReadFull(near, rest); err != nil {
		t.Fatal(err)
	}
	if err := near.Close(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if farErr != nil {
		t.Fatal(farErr)
	}
	return append(atNear, rest...), atFar
}

// FuzzConn compares our connections, above and below, with a plain one: the
// same operations give the same bytes in the same order.
func FuzzConn(f *testing.F) {
	op := func(kind byte, n uint16) []byte { return []byte{kind, byte(n >> 8), byte(n)} }
	f.Add(uint16(0), op(opWrite, chunkSize))
	f.Add(uint16(40000), slices.Concat(op(opWrite, 1317), op(opFlush, 0), op(opRead, 5), op(opRead, 30000), op(opWrite, 4096), op(opPause, 3), op(opRead, 60000)))
	f.Add(uint16(1), slices.Concat(bytes.Repeat(op(opWrite, 1317), 40), op(opDeadline, 1), op(opDirect, 65535), op(opDirect, chunkSize), op(opDirect, longestChunk), op(opPause, 7)))
	r := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		ops := make([]byte, 3*60)
		for i := range ops {
			ops[i] = byte(r.Uint32())
		}
		f.Add(uint16(r.Uint32()), ops)
	}
	f.Fuzz(func(t *testing.T, receive uint16, ops []byte) {
		if len(ops) > 3*200 {
			return
		}
		received := random(int(receive))
		conn, far := pair(t, Sockets)
		gotNear, gotFar := script(t, ops, received, &batchConn{Conn: conn, batches: new(batches)}, far)
		conn, far = pair(t, plain)
		wantNear, wantFar := script(t, ops, received, conn, far)
		if !bytes.Equal(gotFar, wantFar) {
			t.Errorf("%s sent, want %s", summary(gotFar), summary(wantFar))
		}
		if !bytes.Equal(gotNear, wantNear) {
			t.Errorf("%s read, want %s", summary(gotNear), summary(wantNear))
		}
	})
}

func summary(p []byte) string { return fmt.Sprintf("%d bytes (%.20x…)", len(p), p) }
