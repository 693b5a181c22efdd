package relay

import (
	"context"
	"encoding/binary"
	"maps"
	"slices"
	"time"

	"tailscale.com/derp"
)

// textTimeout limits the write of a text.
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
// connection was inside a frame.
const retellEvery = 20 * time.Millisecond

// Tell sets the health problem of this relay in every connected client that has
// another one, or removes it with an empty text, until ctx ends. Later clients are
// reached by the next Tell. [Told] counts the texts under reason.
func (r *Relay) Tell(ctx context.Context, reason, text string) {
	all := r.sessions
	if all.teller == nil {
		return
	}
	all.mu.Lock()
	list := slices.Collect(maps.Keys(all.open))
	all.mu.Unlock()
	for {
		list = slices.DeleteFunc(list, func(s *session) bool {
			done, sent := s.tell(text)
			if sent && text != "" {
				all.teller.count(reason)
			}
			return done || ctx.Err() != nil
		})
		if len(list) == 0 || !sleep(ctx, retellEvery) {
			return
		}
	}
}

// tell writes a text to an admitted client. It is not done while derpserver is
// writing.
func (s *session) tell(text string) (done, sent bool) {
	if !s.writeMu.TryLock() {
		return false, false
	}
	defer s.writeMu.Unlock()
	switch {
	case s.told == text || s.writeErr != nil || !s.out.answered():
		return true, false
	case !s.out.between():
		return false, false
	}
	s.told = text
	s.writeErr = s.insert(healthFrame(text))
	return true, s.writeErr == nil
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
