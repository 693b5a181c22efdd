package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/types/key"
)

// refusedConn is a client's end of a connection that derpserver refuses.
type refusedConn struct {
	net.Conn
	session *session
	first   chan []byte // what the client received up to the end of the first frame after the key
	ended   chan time.Duration
}

// refuse makes a session of a node, with derpserver's key sent and the client's
// key read, and closes it as derpserver does when admission refuses the node. The
// client reads until the end.
func refuse(t *testing.T, all *sessions, node key.NodePublic, private key.NodePrivate, r refusal) refusedConn {
	t.Helper()
	return refuseFrom(t, "192.0.2.7", all, node, private, r)
}

// refuseFrom is refuse for a node at an address.
func refuseFrom(t *testing.T, addr string, all *sessions, node key.NodePublic, private key.NodePrivate, r refusal) refusedConn {
	t.Helper()
	near, far := net.Pipe()
	t.Cleanup(func() { _ = far.Close() })
	s := newSession(all, near, nil, &net.TCPAddr{IP: net.ParseIP(addr), Port: 4000})
	all.add(s)
	c := refusedConn{far, s, make(chan []byte, 1), make(chan time.Duration, 1)}
	serverKey := append([]byte{byte(derp.FrameServerKey), 0, 0, 0, 40}, append([]byte(derp.Magic), private.Public().AppendTo(nil)...)...)
	go func() {
		begun := time.Now()
		_, _ = io.ReadFull(far, make([]byte, len(serverKey)))
		_, _ = far.Write(greetingOf(node, derp.FrameClientInfo))
		var text []byte
		header := make([]byte, derp.FrameHeaderLen)
		if _, err := io.ReadFull(far, header); err == nil {
			text = make([]byte, int(header[4]))
			_, _ = io.ReadFull(far, text)
			text = append(header, text...)
		}
		c.first <- text
		_, _ = io.Copy(io.Discard, far)
		c.ended <- time.Since(begun)
	}()
	if _, err := s.Write(serverKey); err != nil {
		t.Fatal(err)
	}
	_ = s.SetDeadline(time.Now().Add(10 * time.Second)) // as derpserver
	if _, err := io.ReadFull(s, make([]byte, greetingLength+100)); err != nil {
		t.Fatal(err)
	}
	if r.reason != "" {
		_ = all.teller.admit(func(context.Context, key.NodePublic, netip.Addr) error {
			switch r.reason {
			case "unavailable":
				return ErrSourceUnavailable
			case "busy":
				return ErrBusy
			case "retry":
				return fmt.Errorf("%w: secret", ErrRetry)
			}
			return errors.New("refused")
		})(t.Context(), node, netip.Addr{})
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	return c
}

// holding returns a set of sessions with a teller.
func holding(limit int) (*sessions, key.NodePrivate) {
	private := key.NewNode()
	all := newSessions(zerolog.Nop())
	all.teller = newTeller(Config{PrivateKey: private})
	all.teller.limit = limit
	return all, private
}

// end closes the set as [Relay.Close] does.
func (all *sessions) end() {
	all.refuse()
	all.teller.close()
	all.closeAll()
	all.teller.wait()
}

func (all *sessions) count() int {
	all.mu.Lock()
	defer all.mu.Unlock()
	return len(all.open)
}

func (all *sessions) heldNow() int {
	all.teller.mu.Lock()
	defer all.teller.mu.Unlock()
	return len(all.teller.held)
}

var (
	byRefusal = refusal{reason: "refused"}
	byOutage  = refusal{reason: "unavailable"}
)

// A held connection ends after its time, or with the client, and is forgotten.
func TestHoldEnds(t *testing.T) {
	for name, tt := range map[string]struct {
		refusal     refusal
		ends        func(refusedConn)
		least, most time.Duration
	}{
		"refused":           {byRefusal, func(refusedConn) {}, 40 * time.Second, 50 * time.Second},
		"unavailable":       {byOutage, func(refusedConn) {}, 20 * time.Second, 25 * time.Second},
		"busy":              {refusal{reason: "busy"}, func(refusedConn) {}, 5 * time.Second, 6250 * time.Millisecond},
		"retry":             {refusal{reason: "retry"}, func(refusedConn) {}, 0, 0},
		"the client leaves": {byRefusal, func(c refusedConn) { <-time.After(5 * time.Second); _ = c.Close() }, 5 * time.Second, 5 * time.Second},
		"not refused":       {refusal{}, func(refusedConn) {}, 0, 0}, // closed at the key, as for a bad first frame
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				all, private := holding(maxHeld)
				node := key.NewNode().Public()
				c := refuse(t, all, node, private, tt.refusal)
				text := <-c.first
				synctest.Wait()
				if held := tt.least > 0; held != (all.heldNow() == 1) || held != (all.count() == 1) || held != bytes.HasPrefix(text, []byte{byte(derp.FrameHealth)}) {
					t.Errorf("%d held, %d sessions, text %q", all.heldNow(), all.count(), text)
				}
				tt.ends(c)
				if took := <-c.ended; took < tt.least || took > tt.most {
					t.Errorf("held for %s, want %s to %s", took, tt.least, tt.most)
				}
				all.teller.wait()
				if all.heldNow() != 0 || all.count() != 0 {
					t.Errorf("%d held and %d sessions after the end", all.heldNow(), all.count())
				}
				if len(all.teller.refused) != 0 {
					t.Error("a refusal is kept after its connection")
				}
			})
		})
	}
}

// A refusal is forgotten with its connection, also when the connection cannot be
// held because something writes to it.
func TestRefusalIsForgotten(t *testing.T) {
	s := sessionOf(new(recorder), nil)
	all := s.all
	all.teller = newTeller(Config{})
	s.node = key.NewNode().Public()
	refuse := all.teller.admit(func(context.Context, key.NodePublic, netip.Addr) error { return errors.New("refused") })
	_ = refuse(t.Context(), s.node, netip.Addr{})
	s.writeMu.Lock()
	_ = s.Close()
	s.writeMu.Unlock()
	if len(all.teller.refused) != 0 {
		t.Error("a refusal is kept after its connection")
	}
}

// A key has one held connection: a newer one takes its place, but not at once.
func TestHoldOfOneKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all, private := holding(maxHeld)
		node := key.NewNode().Public()
		first := refuse(t, all, node, private, byRefusal)
		<-first.first
		<-time.After(replacedAfter - time.Second)
		early := refuse(t, all, node, private, byRefusal)
		if text := <-early.first; text != nil || <-early.ended != 0 {
			t.Errorf("a second connection was held: %q", text)
		}
		<-time.After(2 * time.Second)
		later := refuse(t, all, node, private, byRefusal)
		if text := <-later.first; text == nil {
			t.Error("a later connection got no text")
		}
		if took := <-first.ended; took != replacedAfter+time.Second {
			t.Errorf("the first connection ended after %s", took)
		}
		synctest.Wait()
		if all.heldNow() != 1 {
			t.Errorf("%d held, want the later one", all.heldNow())
		}
		all.end()
		<-later.ended
	})
}

// The number of held connections is limited. At the stop all end at once.
func TestHoldLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 3
		all, private := holding(limit)
		var held []refusedConn
		for i := range limit + 2 {
			c := refuseFrom(t, fmt.Sprintf("192.0.2.%d", i), all, key.NewNode().Public(), private, byRefusal)
			if text := <-c.first; (text != nil) != (i < limit) {
				t.Errorf("connection %d: text %q", i, text)
			}
			if i < limit {
				held = append(held, c)
			}
		}
		if got := all.heldNow(); got != limit || all.count() != limit {
			t.Errorf("%d held and %d sessions, want %d", got, all.count(), limit)
		}
		all.end()
		for _, c := range held {
			if took := <-c.ended; took != 0 {
				t.Errorf("ended %s after the stop", took)
			}
		}
		all, private = holding(limit)
		all.teller.close()
		late := refuse(t, all, key.NewNode().Public(), private, byRefusal)
		if text := <-late.first; text != nil {
			t.Errorf("held during the stop: %q", text)
		}
		<-late.ended
	})
}

// One address has a quarter of the held connections, so that nodes of others get their
// texts. Clients of a proxy without a header count for no address.
func TestHoldOfOneAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 16
		all, private := holding(limit)
		all.places = newPlaces(Config{TrustedProxies: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}})
		defer all.end()
		hold := func(addr string, want bool) {
			t.Helper()
			c := refuseFrom(t, addr, all, key.NewNode().Public(), private, byRefusal)
			if text := <-c.first; (text != nil) != want {
				t.Errorf("a node at %s: text %q", addr, text)
			}
		}
		for i := range limit/heldOfAddress + 2 {
			hold(fmt.Sprintf("2001:db8::%d", i), i < limit/heldOfAddress)
		}
		hold("2001:db8:0:1::1", true)
		hold("192.0.2.7", true)
		for range limit/heldOfAddress + 2 {
			hold("198.51.100.1", true)
		}
	})
}

// A held client that sends without end is read up to a limit, and then no more.
func TestHoldOfFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all, private := holding(maxHeld)
		c := refuse(t, all, key.NewNode().Public(), private, byRefusal)
		<-c.first
		var sent int
		for {
			n, err := c.Write(make([]byte, 4096))
			sent += n
			if err != nil {
				break
			}
		}
		if sent < heldBytes || sent > heldBytes+4096 {
			t.Errorf("%d bytes were read, want %d", sent, heldBytes)
		}
		if took := <-c.ended; took < heldRefused {
			t.Errorf("a flood ended the hold after %s", took)
		}
		all.teller.wait()
	})
}
