package relay

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// sessionOf returns a session on conn, with the bytes that an HTTP server has
// read.
func sessionOf(conn net.Conn, read []byte) *session {
	buffered := bufio.NewReader(bytes.NewReader(read))
	_, _ = buffered.Peek(len(read))
	s := newSession(newSessions(zerolog.Nop()), conn, buffered, &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 4000})
	s.all.add(s)
	return s
}

// greetingOf returns the first frame of a client.
func greetingOf(node key.NodePublic, kind derp.FrameType) []byte {
	payload := append(node.AppendTo(nil), random(100)...)
	return append(binary.BigEndian.AppendUint32([]byte{byte(kind)}, uint32(len(payload))), payload...)
}

// The client's key is read from its first frame, wherever the HTTP server and
// the reads divide the frame, and every byte is passed on.
func TestSessionNode(t *testing.T) {
	node := key.NewNode().Public()
	short := greetingOf(node, derp.FrameClientInfo)
	binary.BigEndian.PutUint32(short[1:], derp.KeyLen-1)
	for name, tt := range map[string]struct {
		sent []byte
		want key.NodePublic
	}{
		"client info": {greetingOf(node, derp.FrameClientInfo), node},
		"too short":   {short, key.NodePublic{}},
		"incomplete":  {greetingOf(node, derp.FrameClientInfo)[:greetingLength-1], key.NodePublic{}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, before := range []int{0, 1, derp.FrameHeaderLen, greetingLength - 1, greetingLength, len(tt.sent)} {
				for _, size := range []int{1, 7, 1024} {
					before := min(before, len(tt.sent))
					near, far := net.Pipe()
					go func() {
						_, _ = far.Write(tt.sent[before:])
						_ = far.Close()
					}()
					s := sessionOf(near, tt.sent[:before])
					got, err := io.ReadAll(readerOf{s, size})
					if err != nil || !bytes.Equal(got, tt.sent) {
						t.Fatalf("read %d of %d bytes, %v", len(got), len(tt.sent), err)
					}
					if node, _ := s.state(); node != tt.want {
						t.Errorf("%d bytes before, reads of %d: the node is %v, want %v", before, size, node, tt.want)
					}
					_ = s.Close()
				}
			}
		})
	}
}

// readerOf reads at most size bytes at a time.
type readerOf struct {
	io.Reader
	size int
}

func (r readerOf) Read(p []byte) (int, error) { return r.Reader.Read(p[:min(len(p), r.size)]) }

// The end is the first cause, and stays it.
func TestSessionEnd(t *testing.T) {
	broken := errors.New("broken")
	for name, tt := range map[string]struct {
		ends func(s *session, far net.Conn)
		want error
	}{
		"open":              {func(*session, net.Conn) {}, nil},
		"the client closes": {func(s *session, far net.Conn) { _ = far.Close(); _, _ = s.Read(make([]byte, 1)) }, io.EOF},
		"we close":          {func(s *session, _ net.Conn) { _ = s.Close(); _, _ = s.Read(make([]byte, 1)) }, net.ErrClosed},
		"a read fails": {func(s *session, _ net.Conn) {
			_ = s.SetReadDeadline(time.Now())
			_, _ = s.Read(make([]byte, 1))
		}, os.ErrDeadlineExceeded},
		"a write fails": {func(s *session, _ net.Conn) {
			_ = s.SetWriteDeadline(time.Now().Add(-time.Hour))
			_, _ = s.Write(frame(5))
		}, os.ErrDeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			near, far := net.Pipe()
			s := sessionOf(near, nil)
			tt.ends(s, far)
			if _, end := s.state(); !errors.Is(end, tt.want) {
				t.Errorf("ended with %v, want %v", end, tt.want)
			}
			s.ended(broken)
			_ = s.Close()
			if _, end := s.state(); tt.want != nil && !errors.Is(end, tt.want) {
				t.Errorf("the end became %v, want %v", end, tt.want)
			}
			_ = far.Close()
		})
	}
}

// Close ends a write that hangs, and drops the half of a frame that is held.
func TestSessionClose(t *testing.T) {
	near, far := net.Pipe()
	defer func() { _ = far.Close() }()
	s := sessionOf(near, nil)
	failed := make(chan error, 1)
	go func() {
		_, err := s.Write(frame(3000))
		failed <- err
	}()
	if _, err := far.Read(make([]byte, 1)); err != nil { // the write has begun
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := testkit.Receive(t, "the end of the write", failed); err == nil {
		t.Error("the write succeeded")
	}

	below := new(recorder)
	s = sessionOf(below, nil)
	if _, err := s.Write(frame(3000)[:2048]); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if got := below.lengths(); len(got) != 0 || !below.closed {
		t.Errorf("closed %v with writes of %v", below.closed, got)
	}
}

// A set of sessions contains those that are open. Refused sessions are closed.
func TestSessions(t *testing.T) {
	count := func(all *sessions) int {
		all.mu.Lock()
		defer all.mu.Unlock()
		return len(all.open)
	}
	all := newSessions(zerolog.Nop())
	add := func() (*session, *recorder) {
		below := new(recorder)
		s := newSession(all, below, bufio.NewReader(bytes.NewReader(nil)), nil)
		all.add(s)
		return s, below
	}
	first, firstBelow := add()
	_, secondBelow := add()
	if got := count(all); got != 2 {
		t.Errorf("%d sessions, want 2", got)
	}
	if err := errors.Join(first.Close(), first.Close()); err != nil {
		t.Error(err)
	}
	if got := count(all); got != 1 || !firstBelow.closed || secondBelow.closed {
		t.Errorf("%d sessions, want 1", got)
	}
	all.refuse()
	if secondBelow.closed {
		t.Error("refuse closed an open session")
	}
	if _, below := add(); !below.closed || count(all) != 1 {
		t.Error("a session was added after refuse")
	}
	all.closeAll()
	if !secondBelow.closed || count(all) != 0 {
		t.Errorf("%d sessions after closeAll", count(all))
	}
}

// A write times out at the deadline or up to deadlineStep later. A deadline
// that is near the last one costs nothing.
func TestSessionWriteDeadline(t *testing.T) {
	var below recorder
	s := sessionOf(&below, nil)
	at := func(d time.Duration) time.Time { return time.Now().Truncate(time.Hour).Add(2*time.Hour + d) }
	for i, step := range []struct {
		set  func(time.Time) error
		t    time.Time
		want time.Time // zero: unchanged
	}{
		{s.SetWriteDeadline, at(0), at(deadlineStep)},
		{s.SetWriteDeadline, at(time.Millisecond), time.Time{}},
		{s.SetWriteDeadline, at(deadlineStep), time.Time{}},
		{s.SetWriteDeadline, at(deadlineStep + 1), at(2*deadlineStep + 1)},
		{s.SetWriteDeadline, at(0), at(deadlineStep)}, // backward
		{s.SetDeadline, at(7), at(7)},
		{s.SetWriteDeadline, at(7), time.Time{}},
		{s.SetWriteDeadline, at(8), at(8 + deadlineStep)},
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
	for name, set := range map[string]func(time.Time) error{"SetWriteDeadline": s.SetWriteDeadline, "SetDeadline": s.SetDeadline} {
		if err := errors.Join(s.SetWriteDeadline(at(0)), set(time.Time{})); err != nil || !below.set[len(below.set)-1].IsZero() {
			t.Errorf("%s(zero): the deadline below is %v, %v", name, below.set[len(below.set)-1], err)
		}
	}
}
