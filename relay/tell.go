package relay

import (
	"context"
	"encoding/binary"
	"maps"
	"slices"
	"sync"
	"time"

	"tailscale.com/derp"
)

// textTimeout limits the write of a text. It is short, because texts are only written
// to sockets with room.
const textTimeout = 2 * time.Second

// healthFrame returns a frame that sets the health problem of this relay in a
// client, or removes it with an empty text.
func healthFrame(text string) []byte {
	frame := binary.BigEndian.AppendUint32([]byte{byte(derp.FrameHealth)}, uint32(len(text)))
	return append(frame, text...)
}

// Told are the numbers of texts sent to clients since the start, and of the
// connections held now.
type Told struct {
	Texts map[string]int64 // by reason
	Held  int
}

// Told returns the numbers of texts and of held connections.
func (r *Relay) Told() Told {
	t := r.sessions.teller
	if t == nil {
		return Told{}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return Told{maps.Clone(t.told), len(t.held)}
}

// retellEvery is the pause before a text is written to the clients whose
// connection was inside a frame, or full.
const retellEvery = 20 * time.Millisecond

// tellAtOnce limits the concurrent writes of a text. Each client that does not read
// takes one of them for textTimeout.
const tellAtOnce = 64

// notice is a text with its reason. No text is the zero value.
type notice struct{ reason, text string }

// Tell sets the health problem of this relay in every connected client that has
// another one, or removes it with an empty text, until ctx ends. Later clients are
// reached by the next Tell. [Told] counts the texts under reason. A node that is slowed
// down has the text of its [NodeLimit] in place of an empty one.
func (r *Relay) Tell(ctx context.Context, reason, text string) {
	all := r.sessions
	all.mu.Lock()
	all.notice = notice{reason, text}
	list := slices.Collect(maps.Keys(all.open))
	all.mu.Unlock()
	all.deliver(ctx, list)
}

// noticeFor returns the text that a client should have now.
func (all *sessions) noticeFor(s *session) notice {
	all.mu.Lock()
	n := all.notice
	all.mu.Unlock()
	if n.text == "" {
		if p := s.paced.Load(); p != nil && p.slowed.Load() {
			return notice{"slowed", p.text()}
		}
	}
	return n
}

// deliver writes to each client the text that it should have, until ctx ends.
func (all *sessions) deliver(ctx context.Context, list []*session) {
	if all.teller == nil {
		return
	}
	slots := make(chan struct{}, tellAtOnce)
	var writing sync.WaitGroup
	defer writing.Wait()
	tell := func(s *session) (done bool) {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return true
		}
		n := all.noticeFor(s)
		write, done := s.tell(n.text)
		if write == nil {
			<-slots
			return done
		}
		writing.Go(func() {
			if write() == nil && n.text != "" {
				all.teller.count(n.reason)
			}
			<-slots
		})
		return true
	}
	for {
		list = slices.DeleteFunc(list, tell)
		if len(list) == 0 || !sleep(ctx, retellEvery) {
			return
		}
	}
}

// tell returns the function that writes a text to an admitted client, or nil if
// there is nothing to write now. The caller must call it. It is not done while
// derpserver decides about the client or is writing, or the socket is full: the text must not end the connection
// of a client whose link stalls.
func (s *session) tell(text string) (write func() error, done bool) {
	if !s.writeMu.TryLock() {
		return nil, false
	}
	switch {
	case s.told == text || s.writeErr != nil:
		done = true
	case !s.out.answered():
		// derpserver lists a client before it answers. It has the key of the client then.
		node, end := s.state()
		done = node.IsZero() || end != nil
	case s.out.between() && s.hasRoom():
		s.told = text
		return func() error {
			defer s.writeMu.Unlock()
			s.writeErr = s.insert(healthFrame(text))
			return s.writeErr
		}, true
	}
	s.writeMu.Unlock()
	return nil, done
}

// unanswered reports whether derpserver has sent its key and nothing else: it has
// not admitted the client.
func (s *session) unanswered() bool {
	if !s.writeMu.TryLock() {
		return false
	}
	defer s.writeMu.Unlock()
	return s.writeErr == nil && s.out.between() && s.out.frames.last() == derp.FrameServerKey
}

// insert writes a frame of the relay itself between two frames of derpserver. The
// caller holds writeMu.
func (s *session) insert(frame []byte) error {
	if err := s.SetWriteDeadline(time.Now().Add(textTimeout)); err != nil {
		return err
	}
	_, err := s.below.Write(frame)
	return err
}
