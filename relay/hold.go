package relay

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"tailscale.com/derp"
	"tailscale.com/types/key"

	"derpd/internal/caught"
)

// ErrSourceUnavailable and ErrBusy are wrapped by the error of an [AdmitFunc] if no
// source could answer, or if none was asked. Clients get a text for each. A client that
// gets ErrRetry is closed at once without a text, so that it soon connects again.
var (
	ErrSourceUnavailable = errors.New("source of admission unavailable")
	ErrBusy              = errors.New("too many new nodes at once")
	ErrRetry             = errors.New("too many new nodes at this moment")
)

const (
	// heldRefused, heldUnavailable and heldBusy, and up to a quarter more, are the
	// times for which a refused client is held. Each message resets the backoff of
	// tailscaled: without the hold it would connect ten times a second. The text
	// ends when the client is admitted, at its next connection. A member that is
	// new may be among the busy ones, whose attempts have failed for seconds.
	heldRefused, heldUnavailable, heldBusy = 40 * time.Second, 20 * time.Second, 5 * time.Second

	// maxHeld limits the held connections. Each takes the memory of an idle client,
	// and is one of Limits.Strangers.
	maxHeld = 256

	// heldOfAddress is the part of the held connections that one address may have. The
	// nodes of other addresses then get their texts too.
	heldOfAddress = 4

	// heldBytes are read from a held client and discarded. Further bytes stay in
	// the socket, until TCP stops the client. The kernel's buffer of a socket grows
	// with the bytes that are read fast, up to several megabytes.
	heldBytes = 64 << 10

	// replacedAfter is the least age at which a held connection gives its place to
	// a newer one of the same key. Two machines with one key replace each other.
	replacedAfter = 15 * time.Second
)

// refusal is why a client is refused.
type refusal struct {
	reason, text string
	held         time.Duration
}

// teller sends refused clients the reason, and holds their connections. A nil
// teller sends and holds nothing.
//
// derpserver closes the connection of a client that it refuses, and
// [session.Close] asks the teller first. AdmitFunc has returned by then, so refused
// has at most one element for each open connection.
type teller struct {
	private      key.NodePrivate // opens the first frame of clients
	disallowApps []string
	limit        int // on held connections

	ctx  context.Context // ends the holds
	stop context.CancelFunc

	mu      sync.Mutex
	refused map[key.NodePublic]refusal // until derpserver closes the connection; guarded by mu
	held    map[key.NodePublic]*hold   // at most limit; guarded by mu
	told    map[string]int64           // texts sent, by reason, of which derpd has seven; guarded by mu
	closed  bool                       // guarded by mu

	holding sync.WaitGroup
}

// hold is the held connection of one node.
type hold struct {
	session *session
	addr    netip.Addr // by [places.addressOf]
	since   time.Time
	end     context.CancelFunc
}

func newTeller(c Config) *teller {
	t := &teller{
		private: c.PrivateKey, disallowApps: c.DisallowApps, limit: heldLimit(c.Limits),
		refused: make(map[key.NodePublic]refusal),
		held:    make(map[key.NodePublic]*hold),
		told:    make(map[string]int64),
	}
	t.ctx, t.stop = context.WithCancel(context.Background())
	return t
}

// admit wraps next, to note why it refuses a client.
func (t *teller) admit(next AdmitFunc) AdmitFunc {
	if t == nil {
		return next
	}
	return func(ctx context.Context, node key.NodePublic, addr netip.Addr) error {
		err := next(ctx, node, addr)
		if err == nil || errors.Is(err, ErrRetry) {
			return err
		}
		r := refusal{"refused", "this relay does not admit this node, whose key is " + node.ShortString() + "; the owner of the relay can admit it", heldRefused}
		switch {
		case errors.Is(err, ErrSourceUnavailable):
			r = refusal{"unavailable", "this relay cannot ask who may use it now", heldUnavailable}
		case errors.Is(err, ErrBusy):
			r = refusal{"busy", "too many new nodes connect to this relay now; the next attempt may succeed", heldBusy}
		}
		t.mu.Lock()
		defer t.mu.Unlock()
		t.refused[node] = r
		return err
	}
}

// heldLimit leaves half of the places of strangers to connections that may be admitted.
func heldLimit(l Limits) int {
	if l.Strangers == 0 {
		return maxHeld
	}
	return min(maxHeld, l.Strangers/2)
}

// hold takes over the connection of a refused client from derpserver. It returns
// false if the connection must be closed.
func (t *teller) hold(s *session) bool {
	if t == nil {
		return false
	}
	node, end := s.state()
	r, refused := t.take(node) // for every connection, so that no refusal is kept
	if !s.unanswered() {
		return false
	}
	if !refused && end == nil && t.disallowed(s, node) {
		r, refused = refusal{"app", "this relay does not admit the app of this client", heldRefused}, true
	}
	if !refused || end != nil {
		return false
	}
	addr := s.all.places.addressOf(addrPort(s.client).Addr())
	t.mu.Lock()
	defer t.mu.Unlock()
	switch older := t.held[node]; {
	case t.closed,
		older == nil && (len(t.held) >= t.limit || t.heldOf(addr) >= max(1, t.limit/heldOfAddress)),
		older != nil && time.Since(older.since) < replacedAfter:
		return false
	case older != nil:
		older.end()
	}
	ctx, cancel := context.WithTimeout(t.ctx, r.held+rand.N(r.held/4))
	t.held[node] = &hold{s, addr, time.Now(), cancel}
	t.holding.Go(func() {
		defer cancel()
		defer func() {
			if v := recover(); v != nil {
				caught.Panic(s.all.log, "held connection", v)
			}
			t.release(node, s)
			_ = s.close()
		}()
		t.keep(ctx, s, r)
	})
	return true
}

// heldOf returns the number of held connections of an address. The zero address stands
// for many clients, and has none. It holds t.mu.
func (t *teller) heldOf(addr netip.Addr) (count int) {
	for _, h := range t.held {
		if addr.IsValid() && h.addr == addr {
			count++
		}
	}
	return count
}

// take returns why a node was refused, once.
func (t *teller) take(node key.NodePublic) (r refusal, refused bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, refused = t.refused[node]
	delete(t.refused, node)
	return r, refused
}

// keep sends the text and discards what the client sends, until ctx or the
// connection ends.
func (t *teller) keep(ctx context.Context, s *session, r refusal) {
	_ = s.SetDeadline(time.Time{}) // of derpserver
	s.writeMu.Lock()
	err := s.insert(healthFrame(r.text))
	s.writeMu.Unlock()
	if err != nil {
		return
	}
	t.count(r.reason)
	defer context.AfterFunc(ctx, func() { _ = s.below.SetReadDeadline(time.Unix(1, 0)) })()
	var discarded [512]byte
	for n := 0; ; {
		read, err := s.below.Read(discarded[:])
		if err != nil {
			return
		}
		if n += read; n >= heldBytes {
			<-ctx.Done()
			return
		}
	}
}

// release forgets a held connection.
func (t *teller) release(node key.NodePublic, s *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if h := t.held[node]; h != nil && h.session == s {
		delete(t.held, node)
	}
}

// count counts a text that was sent.
func (t *teller) count(reason string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.told[reason]++
}

// close ends the holds. Later ones are refused.
func (t *teller) close() {
	if t == nil {
		return
	}
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.stop()
}

// wait waits until every held connection is closed.
func (t *teller) wait() {
	if t != nil {
		t.holding.Wait()
	}
}

// disallowed reports whether derpserver has refused the client for its app.
func (t *teller) disallowed(s *session, node key.NodePublic) bool {
	info, ok := s.info(t.private, node)
	return ok && slices.Contains(t.disallowApps, info.AppName)
}

// info returns what the client has sent about itself, in the encrypted part of its
// first frame. It is not ok without [firstBytes].
func (s *session) info(private key.NodePrivate, node key.NodePublic) (info derp.ClientInfo, ok bool) {
	first, ok := s.Conn.(*firstBytes)
	if !ok || len(first.bytes) < greetingLength {
		return info, false
	}
	length := int64(binary.BigEndian.Uint32(first.bytes[1:])) + derp.FrameHeaderLen
	if length < greetingLength || length > int64(len(first.bytes)) {
		return info, false
	}
	text, ok := private.OpenFrom(node, first.bytes[greetingLength:length])
	return info, ok && json.Unmarshal(text, &info) == nil
}

// firstBytes is a connection that keeps the first bytes read from it.
type firstBytes struct {
	net.Conn
	bytes  []byte // owned by the reader
	closed bool   // whether no more bytes are kept; owned by the reader
}

// firstBytesLength is longer than the first frame of any client today.
const firstBytesLength = 1 << 10

// Read implements [net.Conn].
func (c *firstBytes) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if room := firstBytesLength - len(c.bytes); room > 0 && !c.closed {
		c.bytes = append(c.bytes, p[:min(n, room)]...)
	}
	return n, err
}
