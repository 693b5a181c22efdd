package relay

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"tailscale.com/derp"
)

// recorder is a connection that keeps each write.
type recorder struct {
	net.Conn // nil: the other methods are not used
	mu       sync.Mutex
	writes   [][]byte    // guarded by mu
	fail     error       // of writes; guarded by mu
	closed   bool        // guarded by mu
	set      []time.Time // write deadlines; guarded by mu
}

func (c *recorder) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fail != nil {
		return 0, c.fail
	}
	c.writes = append(c.writes, bytes.Clone(p))
	return len(p), nil
}

func (c *recorder) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	return nil
}

func (c *recorder) SetDeadline(t time.Time) error { return c.SetWriteDeadline(t) }

func (c *recorder) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.set = append(c.set, t)
	return nil
}

func (c *recorder) lengths() []int {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []int
	for _, p := range c.writes {
		list = append(list, len(p))
	}
	return list
}

func (c *recorder) bytes() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Concat(c.writes...)
}

// frame returns a frame of the given length with its header.
func frame(length int) []byte {
	p := random(length)
	p[0] = byte(derp.FrameRecvPacket)
	binary.BigEndian.PutUint32(p[1:], uint32(length-derp.FrameHeaderLen))
	return p
}

// held returns the number of bytes held. A buffer without content fails.
func (s *session) held(t *testing.T) int {
	t.Helper()
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	if (s.out.buffer == nil) != (s.out.length == 0) {
		t.Errorf("%d bytes are held, and the buffer is %p", s.out.length, s.out.buffer)
	}
	return s.out.length
}

// Batches of frames, written as derpserver writes them: through a buffer, and
// with a flush at the end.
func TestJoinBatch(t *testing.T) {
	for name, tt := range map[string]struct {
		buffer int
		frames []int
		want   []int // lengths of the writes below
	}{
		"keepalive":                 {2048, []int{5}, []int{5}},
		"packet":                    {2048, []int{1317}, []int{1317}},
		"eight packets":             {2048, slices.Repeat([]int{1317}, 8), []int{10536}},
		"eight packets, 4 KiB":      {4096, slices.Repeat([]int{1317}, 8), []int{10536}},
		"thirty small packets":      {2048, slices.Repeat([]int{101}, 30), []int{3030}},
		"more than a record":        {2048, slices.Repeat([]int{1317}, 32), []int{16384, 16384, 9376}},
		"exactly a record":          {2048, []int{16000, 384}, []int{16000, 384}},
		"longer than the buffer":    {2048, []int{8229}, []int{8229}},
		"two longer ones":           {2048, []int{8229, 8229}, []int{8229, 8229}},
		"longest packet":            {2048, []int{65573}, []int{16384, 49189}},
		"packets, then a long one":  {2048, slices.Concat(slices.Repeat([]int{2000}, 5), []int{60000}), []int{16384, 53616}},
		"long one, then short ones": {2048, []int{8229, 5, 5}, []int{8229, 10}},
		// The buffer ends with a frame: sent early.
		"frame ends with buffer": {2048, []int{1000, 1048, 500, 300}, []int{2048, 800}},
		// The buffer ends inside the header.
		"header is split": {2048, []int{2045, 500, 300}, []int{2845}},
	} {
		t.Run(name, func(t *testing.T) {
			var below recorder
			s := sessionOf(&below, nil)
			w := bufio.NewWriterSize(s, tt.buffer)
			var want []byte
			for _, length := range tt.frames {
				f := frame(length)
				want = append(want, f...)
				for _, part := range [][]byte{f[:5], f[5:min(37, length)], f[min(37, length):]} { // header, key, packet
					if _, err := w.Write(part); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			if held := s.held(t); held != 0 {
				t.Errorf("%d bytes are held after the batch", held)
			}
			if got := below.lengths(); !slices.Equal(got, tt.want) {
				t.Errorf("writes of %v, want %v", got, tt.want)
			}
			if !bytes.Equal(below.bytes(), want) {
				t.Error("the bytes differ")
			}
		})
	}
}

// The HTTP response is sent at once, and frames are followed after it.
func TestJoinAfterResponse(t *testing.T) {
	const response = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\n\r\n"
	var below recorder
	s := sessionOf(&below, nil)
	f := frame(3000)
	for _, p := range [][]byte{[]byte(response), f[:2048], f[2048:]} {
		if _, err := s.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := below.lengths(), []int{len(response), 3000}; !slices.Equal(got, want) {
		t.Errorf("writes of %v, want %v", got, want)
	}
	// A frame with the bytes of a response is a frame, and so is the next.
	f = frame(3000)
	copy(f[2048:], "HTTP/1.1")
	next := frame(4000)
	for _, p := range [][]byte{f[:2048], f[2048:], next[:2048], next[2048:]} {
		if _, err := s.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := below.lengths(), []int{len(response), 3000, 3000, 4000}; !slices.Equal(got, want) {
		t.Errorf("writes of %v, want %v", got, want)
	}
}

// A stream that is not DERP is never held.
func TestJoinOtherStream(t *testing.T) {
	var below recorder
	s := sessionOf(&below, nil)
	for i := range 10 {
		if _, err := s.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
			t.Fatal(err)
		}
		if got := len(below.lengths()); got != i+1 {
			t.Fatalf("%d writes below after %d above", got, i+1)
		}
	}
	// The longest frame that clients accept is a frame.
	header := binary.BigEndian.AppendUint32([]byte{byte(derp.FrameRecvPacket)}, longestFrame)
	if f := new(frames); !f.follow(header) || f.lost {
		t.Error("the longest frame is not followed")
	}
	header = binary.BigEndian.AppendUint32([]byte{byte(derp.FrameRecvPacket)}, longestFrame+1)
	if f := new(frames); f.follow(header) {
		t.Error("a longer frame is followed")
	}
}

// A failed write, whether direct or of the bytes held, is the result of every
// later write.
func TestJoinErrors(t *testing.T) {
	broken := errors.New("broken")
	long := frame(3000)
	for name, writes := range map[string][][]byte{
		"direct": {frame(5)},
		"held":   {long[:2048], long[2048:]},
		"full":   {frame(60000)[:16000], make([]byte, 2048)},
	} {
		below := &recorder{fail: broken}
		s := sessionOf(below, nil)
		for i, p := range writes {
			_, err := s.Write(p)
			if last := i == len(writes)-1; last != (err != nil) {
				t.Errorf("%s: write %d: %v", name, i, err)
			}
		}
		below.fail = nil
		if n, err := s.Write(frame(5)); n != 0 || !errors.Is(err, broken) {
			t.Errorf("%s: a later write: %d, %v, want the first error", name, n, err)
		}
		if got := below.lengths(); len(got) > 0 {
			t.Errorf("%s: writes of %v after the error", name, got)
		}
		if s.held(t) != 0 {
			t.Errorf("%s: a failed connection holds a buffer", name)
		}
	}
}

// discard is a connection that takes every write.
type discard struct{ net.Conn }

func (discard) Write(p []byte) (int, error) { return len(p), nil }

func TestJoinAllocatesNothing(t *testing.T) {
	batch := bytes.Repeat(frame(1317), 8)
	s := sessionOf(discard{}, nil)
	if got := testing.AllocsPerRun(1000, func() {
		for p := range slices.Chunk(batch, 2048) {
			_, _ = s.Write(p)
		}
	}); got != 0 {
		t.Errorf("%v allocations for a batch", got)
	}
	if s.held(t) != 0 {
		t.Error("bytes are held after the batch")
	}
}

// FuzzJoin writes a stream in pieces. The bytes below are those of the stream,
// and nothing is held after a write that ends with a frame.
func FuzzJoin(f *testing.F) {
	f.Add(slices.Concat(frame(5), frame(1317), frame(9)), []byte{3, 200, 7})
	f.Add(bytes.Repeat(frame(1317), 20), []byte{255, 255})
	f.Add(frame(60000), []byte{1, 255, 4})
	f.Add([]byte("HTTP/1.1 101 Switching Protocols\r\n\r\n\x01\x00\x00\x00\x01x"), []byte{38, 1, 1})
	f.Add([]byte("\x01\xff\xff\xff\xffx"), []byte{1})
	f.Fuzz(func(t *testing.T, stream, pieces []byte) {
		var below recorder
		s := sessionOf(&below, nil)
		sent := 0
		for i := 0; sent < len(stream) && len(pieces) > 0; i++ {
			n := min(int(pieces[i%len(pieces)])*37+1, len(stream)-sent)
			p := stream[sent : sent+n]
			sent += n
			if got, err := s.Write(p); got != n || err != nil {
				t.Fatalf("%d of %d bytes, %v", got, n, err)
			}
			held := s.held(t)
			if got := below.bytes(); len(got)+held != sent || !bytes.Equal(got, stream[:len(got)]) {
				t.Fatalf("%d bytes sent and %d held of %d", len(got), held, sent)
			}
			if held > 0 && atEnd(stream[:sent]) {
				t.Fatalf("%d bytes are held at the end of a frame", held)
			}
		}
	})
}

// atEnd reports whether a stream of frames ends with a frame, or is not frames.
func atEnd(stream []byte) bool {
	if bytes.HasPrefix(stream, []byte("HTTP/")) {
		return false // depends on the pieces
	}
	for len(stream) > 0 {
		if len(stream) < derp.FrameHeaderLen {
			return false
		}
		length := uint64(binary.BigEndian.Uint32(stream[1:]))
		if length > longestFrame {
			return true
		}
		if uint64(len(stream)) < derp.FrameHeaderLen+length {
			return false
		}
		stream = stream[derp.FrameHeaderLen+length:]
	}
	return true
}
