package relay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// sockets adds the layer under test.
func sockets(l net.Listener) net.Listener { return socketListener{l, nil, nil} }

// plain adds no layer.
func plain(l net.Listener) net.Listener { return l }

func random(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rand.Uint32())
	}
	return p
}

// pair returns both ends of a TCP connection. The first one is accepted by a
// listener with a layer.
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

func TestSocketHoldsNothing(t *testing.T) {
	conn, far := pair(t, sockets)
	c := conn.(*socketConn)
	holds := func(want bool) {
		t.Helper()
		if got := c.buffer != nil; got != want {
			t.Errorf("holds a buffer: %v, want %v", got, want)
		}
	}
	// The socket is empty: no buffer is held during the wait.
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
		t.Error("the bytes differ")
	}
	if err := far.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(got); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	holds(false)
}

// reset ends a connection with a reset, as a crash of the peer does.
func reset(t *testing.T, c *net.TCPConn) {
	t.Helper()
	if err := errors.Join(c.SetLinger(0), c.Close()); err != nil {
		t.Fatal(err)
	}
}

// Errors are those of a connection of package net.
func TestSocketErrors(t *testing.T) {
	c, far := pair(t, sockets)
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

// A write that is larger than the socket's buffer waits for room. Concurrent
// writes do not mix.
func TestSocketWrites(t *testing.T) {
	conn, far := pair(t, sockets)
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
			t.Fatal("two writes are mixed")
		}
	}
	if n, err := conn.Write(nil); n != 0 || err != nil {
		t.Errorf("an empty write: %d, %v", n, err)
	}
}

// A failed write returns the number of bytes sent, and the error of package net.
func TestSocketWriteErrors(t *testing.T) {
	conn, far := pair(t, sockets)
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

// Operations of a script.
const (
	opWrite = iota
	opDeadline
	opRead
	operations
)

// script runs operations, three bytes each, on one end of a connection whose
// other end sends received. It returns what both ends got.
func script(t *testing.T, ops []byte, received []byte, near net.Conn, far *net.TCPConn) (atNear, atFar []byte) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = far.Write(received) })
	var farErr error
	wg.Go(func() { atFar, farErr = io.ReadAll(far) })
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
			_, err = near.Write(content(n))
		case opDeadline:
			err = near.SetDeadline(time.Now().Add(time.Minute + time.Duration(n)*time.Millisecond))
		case opRead:
			p := make([]byte, min(n, len(received)-len(atNear)))
			_, err = io.ReadFull(near, p)
			atNear = append(atNear, p...)
		}
		if err != nil {
			t.Fatal(err)
		}
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

// FuzzSocket compares a socketConn with a plain connection: the same operations
// give the same bytes.
func FuzzSocket(f *testing.F) {
	op := func(kind byte, n uint16) []byte { return []byte{kind, byte(n >> 8), byte(n)} }
	f.Add(uint16(0), op(opWrite, 2048))
	f.Add(uint16(40000), slices.Concat(op(opWrite, 1317), op(opRead, 5), op(opRead, 30000), op(opWrite, 4096), op(opRead, 60000)))
	f.Add(uint16(40000), slices.Concat(op(opRead, 5), op(opRead, readAheadSize-1), op(opRead, readAheadSize)))
	f.Add(uint16(1), slices.Concat(bytes.Repeat(op(opWrite, 1317), 40), op(opDeadline, 1), op(opWrite, 65535)))
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
		conn, far := pair(t, sockets)
		gotNear, gotFar := script(t, ops, received, conn, far)
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
