package relay

import (
	"bytes"
	"encoding/binary"
	"net"
	"sync"

	"tailscale.com/derp"
)

// recordSize is the payload of the largest TLS record (RFC 8446 §5.1).
const recordSize = 16 << 10

// recordBuffers holds *[recordSize]byte.
var recordBuffers = sync.Pool{New: func() any { return new([recordSize]byte) }}

// joiner joins the writes of derpserver to one connection.
//
// derpserver writes frames through a small buffer. It flushes the buffer when
// the buffer is full, mostly in the middle of a frame, and at the end of each
// batch of frames. Each flush would be one TLS record and one system call. So
// the joiner holds the bytes of a write that ends inside a frame: derpserver
// always writes the rest of the frame at once. A write that ends with a frame
// is sent together with the bytes held.
//
// The buffer is held only while a batch is written: an idle client has none.
type joiner struct {
	mu      sync.Mutex // held by one writer
	frames  frames
	started bool              // whether there was a write
	buffer  *[recordSize]byte // nil when nothing is held
	length  int               // of the bytes held
	err     error             // sticky write error, returned by every later write
}

// write sends p to conn, or holds the end of p.
func (j *joiner) write(conn net.Conn, p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.err != nil {
		return 0, j.err
	}
	// The HTTP response has no frames. With the fast start there is none.
	response := !j.started && bytes.HasPrefix(p, []byte("HTTP/"))
	j.started = true
	inside := !response && j.frames.follow(p)
	if j.length == 0 && !inside {
		n, err := conn.Write(p)
		j.err = err
		return n, err
	}
	for rest := p; len(rest) > 0; {
		if j.buffer == nil {
			j.buffer = recordBuffers.Get().(*[recordSize]byte)
		}
		n := copy(j.buffer[j.length:], rest)
		j.length += n
		rest = rest[n:]
		if j.length == recordSize || len(rest) == 0 && !inside {
			if err := j.flush(conn); err != nil {
				return 0, err
			}
		}
	}
	return len(p), nil
}

// flush sends the bytes held and releases the buffer. j.mu is locked.
func (j *joiner) flush(conn net.Conn) error {
	_, j.err = conn.Write(j.buffer[:j.length])
	recordBuffers.Put(j.buffer)
	j.buffer, j.length = nil, 0
	return j.err
}

// longestFrame is the length that clients accept (derp.Client.Recv).
const longestFrame = 1 << 20

// frames is a position in a stream of DERP frames. A frame is a header, with
// the type and the length of the payload, and the payload.
type frames struct {
	header [derp.FrameHeaderLen]byte
	read   int    // length of header so far
	rest   uint32 // bytes of the payload still to come, once header is complete
	lost   bool   // whether the stream turned out not to be frames
}

// follow moves the position by p. It reports whether the position is inside a
// frame. In a stream that is not frames the position is never inside one, so
// that nothing is held.
func (f *frames) follow(p []byte) (inside bool) {
	for len(p) > 0 && !f.lost {
		if f.read < len(f.header) {
			n := copy(f.header[f.read:], p)
			f.read += n
			p = p[n:]
			if f.read < len(f.header) {
				return true
			}
			f.rest = binary.BigEndian.Uint32(f.header[1:])
			f.lost = f.rest > longestFrame
		}
		n := min(len(p), int(f.rest))
		p = p[n:]
		f.rest -= uint32(n)
		if f.rest == 0 {
			f.read = 0
		}
	}
	return f.read > 0 && !f.lost
}
