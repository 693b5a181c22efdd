package relay

import (
	"encoding/binary"
	"errors"

	"go4.org/mem"
	"tailscale.com/derp"
	"tailscale.com/types/key"
)

const (
	// longestClientInfo is the longest first frame. Client infos have some 200 bytes.
	// derpserver allocates a buffer of the length in the header, up to 256 KiB, before
	// it has admitted the client.
	longestClientInfo = 4 << 10

	// longestOrdinary is the longest ordinary packet. Nodes send packets of at most
	// about 1,400 bytes, and longer ones with TS_DEBUG_MTU.
	longestOrdinary = 2 << 10
)

var errFirstFrame = errors.New("first frame is no client info, or is too long")

// incoming is a position in the frames that a client sends. It is owned by the reader.
type incoming struct {
	rest    int64 // bytes of the frame still to come
	skip    bool  // whether the frame is dropped
	greeted bool  // whether the first frame has begun
	size    int32 // memory of the large packet that is read; zero for other frames

	start *beginning // nil between frames, as on an idle connection
	to    *backlog   // of the receiver of the large packet
}

// beginning is the beginning of a frame, which derpserver may not get yet or gets next.
type beginning struct {
	bytes [derp.FrameHeaderLen + 2*derp.KeyLen]byte
	kept  int    // number of bytes that derpserver may not get yet
	give  []byte // bytes that derpserver gets next
}

// read reads the frames of the client. derpserver gets no byte of a frame that is
// dropped, and none of a first frame that is refused.
func (s *session) read(p []byte) (int, error) {
	in := &s.in
	for {
		switch {
		case in.start != nil && len(in.start.give) > 0:
			n := copy(p, in.start.give)
			if in.start.give = in.start.give[n:]; len(in.start.give) == 0 {
				in.start = nil
			}
			return n, nil
		case in.skip && in.rest > 0:
			if err := s.discard(); err != nil {
				return 0, err
			}
		case in.start == nil && len(p) >= len(beginning{}.bytes):
			n, err := s.Conn.Read(p)
			n, refused := s.follow(p[:n])
			if refused != nil {
				return 0, refused
			}
			if n > 0 || err != nil && in.start == nil {
				return n, err
			}
		case in.rest > 0 || len(p) == 0:
			n, err := s.Conn.Read(p[:min(int64(len(p)), in.rest)])
			in.rest -= int64(n)
			return n, err
		default:
			if err := s.readStart(); err != nil {
				return 0, err
			}
		}
	}
}

// follow moves the position by p, and removes from p what derpserver may not get. It
// returns the remaining length.
func (s *session) follow(p []byte) (n int, err error) {
	in := &s.in
	for at := 0; at < len(p); {
		if in.rest == 0 && !in.ordinary(p[at:]) {
			needed, err := s.begin(p[at:])
			if err != nil || len(p)-at < needed {
				in.start = new(beginning)
				in.start.kept = copy(in.start.bytes[:], p[at:])
				return n, err
			}
		}
		part := p[at : at+int(min(in.rest, int64(len(p)-at)))]
		at += len(part)
		in.rest -= int64(len(part))
		if in.skip {
			continue
		}
		if n += len(part); n < at {
			copy(p[n-len(part):], part)
		}
	}
	return n, nil
}

// ordinary begins a frame that is too short for a large packet. It is fast, and does
// what begin does.
func (in *incoming) ordinary(start []byte) bool {
	if !in.greeted || len(start) < derp.FrameHeaderLen {
		return false
	}
	length := binary.BigEndian.Uint32(start[1:])
	if length > longestOrdinary+derp.KeyLen {
		return false
	}
	in.rest = derp.FrameHeaderLen + int64(length)
	in.skip, in.size = false, 0
	return true
}

// readStart reads until the client's next frame can be judged.
func (s *session) readStart() error {
	in := &s.in
	if in.start == nil {
		in.start = new(beginning)
	}
	begun := in.start
	needed, err := s.begin(begun.bytes[:begun.kept])
	if err != nil {
		return err
	}
	if begun.kept < needed {
		n, err := s.Conn.Read(begun.bytes[begun.kept:needed])
		if begun.kept += n; err == nil || begun.kept == 0 {
			return err
		}
		// The stream ends here. The next read returns the error again.
		in.rest = int64(begun.kept)
		in.skip = false
	}
	in.rest -= int64(begun.kept)
	if in.skip {
		in.start = nil
	} else {
		begun.give = begun.bytes[:begun.kept]
	}
	begun.kept = 0
	return nil
}

// discard reads a part of a frame that is dropped.
func (s *session) discard() error {
	buffer := recordBuffers.Get().(*[recordSize]byte)
	defer recordBuffers.Put(buffer)
	n, err := s.Conn.Read(buffer[:min(recordSize, s.in.rest)])
	s.in.rest -= int64(n)
	return err
}

// begin judges a frame by its beginning. It returns the number of bytes that it needs,
// and does nothing while it has fewer.
func (s *session) begin(start []byte) (needed int, err error) {
	if len(start) < derp.FrameHeaderLen {
		return derp.FrameHeaderLen, nil
	}
	in := &s.in
	kind, length := derp.FrameType(start[0]), binary.BigEndian.Uint32(start[1:])
	keys := uint32(0) // bytes of keys to see
	switch {
	case !in.greeted:
		if kind != derp.FrameClientInfo || length > longestClientInfo {
			s.all.refusedFirst.Add(1)
			return 0, errFirstFrame
		}
		keys = min(length, derp.KeyLen)
	case kind == derp.FrameSendPacket && length > longestOrdinary+derp.KeyLen:
		keys = derp.KeyLen
	case kind == derp.FrameForwardPacket && length > longestOrdinary+2*derp.KeyLen:
		keys = 2 * derp.KeyLen
	}
	needed = derp.FrameHeaderLen + int(keys)
	if len(start) < needed {
		return needed, nil
	}
	in.rest = derp.FrameHeaderLen + int64(length)
	in.skip, in.size = false, 0
	switch last := start[:needed]; {
	case keys < derp.KeyLen:
	case !in.greeted:
		s.mu.Lock()
		s.node = key.NodePublicFromRaw32(mem.B(last[len(last)-derp.KeyLen:]))
		s.mu.Unlock()
		s.all.greeted(s)
	default:
		size := roomFor(length - keys)
		in.to, in.skip = s.all.queue(key.NodePublicFromRaw32(mem.B(last[len(last)-derp.KeyLen:])), size)
		if in.to != nil {
			in.size = int32(size)
		}
	}
	in.greeted = true
	return needed, nil
}

// unread corrects the backlog of the receiver when a large packet stays incomplete.
func (s *session) unread() {
	if in := &s.in; in.size > 0 && in.rest > 0 {
		s.all.unqueue(in.to, int(in.size))
		in.size = 0
	}
}

// Excess is what clients have sent beyond the limits since the start.
type Excess struct {
	FirstFrames  int64 // connections ended for their first frame
	LargePackets int64 // packets above 2 KiB that were dropped, because their receiver is slow
}

// Excess returns what clients have sent beyond the limits.
func (r *Relay) Excess() Excess {
	return Excess{r.sessions.refusedFirst.Load(), r.sessions.droppedLarge.Load()}
}
