package relay

import (
	"bytes"
	"encoding/binary"
	"sync"

	"tailscale.com/derp"
)

// recordSize is the payload of the largest TLS record (RFC 8446 §5.1).
const recordSize = 16 << 10

// recordBuffers holds *[recordSize]byte.
var recordBuffers = sync.Pool{New: func() any { return new([recordSize]byte) }}

// joiner joins the writes of derpserver on one connection.
//
// derpserver writes frames through a small buffer. It flushes the buffer when
// the buffer is full, mostly in the middle of a frame, and at the end of each
// batch of frames. Each flush would be one TLS record and one system call. The
// joiner therefore holds the bytes of a write that ends inside a frame, because
// derpserver always writes the rest of the frame at once. A write that ends with
// a frame is sent together with the bytes held.
//
// Only a connection in the middle of a batch has a buffer. An idle client has
// none.
type joiner struct {
	frames  frames
	started bool              // whether there was a write
	buffer  *[recordSize]byte // nil when nothing is held
	length  int               // of the bytes held
}

// follow reports whether p, the next write, ends inside a frame.
func (j *joiner) follow(p []byte) (inside bool) {
	// The HTTP response has no frames. A client with the fast start gets no
	// response.
	response := !j.started && bytes.HasPrefix(p, []byte("HTTP/"))
	j.started = true
	return !response && j.frames.follow(p)
}

// next takes bytes of a write, and returns the bytes to send now, or nil, and
// the rest of the write. After sending, sent must be called.
func (j *joiner) next(p []byte, inside bool) (send, rest []byte) {
	if j.length == 0 && !inside {
		return p, nil
	}
	if j.buffer == nil {
		j.buffer = recordBuffers.Get().(*[recordSize]byte)
	}
	n := copy(j.buffer[j.length:], p)
	j.length += n
	if rest = p[n:]; j.length == recordSize || len(rest) == 0 && !inside {
		return j.buffer[:j.length], rest
	}
	return nil, rest
}

// between reports whether the bytes sent end with a frame, so that another frame
// may follow.
func (j *joiner) between() bool {
	return j.started && j.length == 0 && j.frames.read == 0 && !j.frames.lost
}

// answered reports whether derpserver has written more than its key, which it does
// only for a client that it has admitted.
func (j *joiner) answered() bool {
	return j.started && !j.frames.lost && j.frames.last() != 0 && j.frames.last() != derp.FrameServerKey
}

// sent releases the buffer.
func (j *joiner) sent() {
	if j.buffer != nil {
		recordBuffers.Put(j.buffer)
		j.buffer, j.length = nil, 0
	}
}

// longestFrame is the length that clients accept (derp.Client.Recv).
const longestFrame = 1 << 20

// frames is a position in a stream of DERP frames. A frame is a header, with
// the type and the length of the payload, and the payload.
type frames struct {
	header [derp.FrameHeaderLen]byte
	read   uint8  // length of header so far
	lost   bool   // whether a length was too long, so that the stream has no frames
	rest   uint32 // bytes of the payload still to come, once header is complete
	large  uint32 // memory of the large packets that have ended
}

// follow moves the position by p. It reports whether the new position is inside a
// frame. A stream without frames is never inside a frame, so its bytes are not
// held.
func (f *frames) follow(p []byte) (inside bool) {
	for len(p) > 0 && !f.lost {
		if f.read < derp.FrameHeaderLen {
			n := copy(f.header[f.read:], p)
			f.read += uint8(n)
			p = p[n:]
			if f.read < derp.FrameHeaderLen {
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
			if length := binary.BigEndian.Uint32(f.header[1:]); length > longestOrdinary+derp.KeyLen && f.last() == derp.FrameRecvPacket {
				f.large += uint32(roomFor(length - derp.KeyLen))
			}
		}
	}
	return f.read > 0 && !f.lost
}

// last returns the type of the frame that is being written or was written last, or
// zero. It is only valid between frames or inside a payload.
func (f *frames) last() derp.FrameType { return derp.FrameType(f.header[0]) }
