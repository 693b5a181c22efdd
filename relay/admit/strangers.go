package admit

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"tailscale.com/types/key"
	"tailscale.com/util/lru"
)

// Members are nodes that a source admitted within knownFor. Strangers are all others.
// The sources that are not local are asked about members and about strangers in
// separate slots, and about strangers at a limited rate.
const (
	// membersAtOnce limits the concurrent questions about members that connect, and
	// memberWait the wait for one. A member whose wait ends keeps its grace.
	membersAtOnce = 16
	memberWait    = 1500 * time.Millisecond

	// QuestionsPerSecond, QuestionsAtOnce and QuestionsRunning limit the questions
	// about strangers: the rate, the questions after a pause, and those under way.
	QuestionsPerSecond = lanes * lanePerSecond
	QuestionsAtOnce    = lanes * laneAtOnce
	QuestionsRunning   = lanes * laneRunning

	// Each lane has a part of these limits. One address (IPv6: one /64) has a part
	// of each lane.
	lanePerSecond    = 5
	laneAtOnce       = 3
	laneRunning      = 4
	addressPerSecond = 3

	// maxWait limits the wait of a stranger for its question. Without a question
	// within maxWait it is refused at once.
	maxWait = 500 * time.Millisecond

	// refusedFor is the time for which a refusal answers the next attempts of the
	// same node. A node that was just added waits for this time at most.
	refusedFor = 3 * time.Second

	// tooManyFor is the time for which the attempts of a node exceed the limits
	// before its error wraps ErrTooManyForLong.
	tooManyFor = 5 * time.Second

	// maxStrangers limits each table of strangers and of addresses. A full table
	// loses its oldest element.
	maxStrangers = 10_000
)

// ErrTooMany is the error for a stranger whose question exceeds the limits. The node
// is refused, no source was asked, and an attempt in some milliseconds may succeed.
var ErrTooMany = errors.New("too many questions about unknown nodes; another attempt may succeed")

// ErrTooManyForLong wraps ErrTooMany for a node that exceeds the limits for seconds.
var ErrTooManyForLong = fmt.Errorf("for more than %s: %w", tooManyFor, ErrTooMany)

// The lanes separate the strangers that compete for questions. Nodes with a new key for
// each attempt use only the first lane, and leave the others to nodes that try again.
// Nodes that keep their key are asked about once, and then use the lane of refused nodes.
const (
	firstLane   = iota // nodes at their first attempt
	againLane          // nodes whose earlier attempt exceeded the limits
	refusedLane        // nodes that every source refused before
	addressLane        // nodes at an address from which an admitted node came
	lanes
)

// openTo is the lanes that a node may use, by its own lane. addressLane needs the address
// of a member.
var openTo = [...][]int{
	firstLane:   {addressLane, firstLane},
	againLane:   {addressLane, againLane, firstLane},
	refusedLane: {addressLane, refusedLane},
}

// strangers limits the questions about strangers, and remembers their attempts.
type strangers struct {
	memberAddr func(netip.Addr) bool // may be nil
	running    [lanes]chan struct{}  // holds one element for each question under way

	mu        sync.Mutex
	limiters  [lanes]*rate.Limiter                    // used under mu
	addresses lru.Cache[addressInLane, *rate.Limiter] // guarded by mu
	refused   lru.Cache[key.NodePublic, time.Time]    // last refusal by every source; guarded by mu
	limited   lru.Cache[key.NodePublic, time.Time]    // first of the attempts that exceeded the limits; guarded by mu
}

type addressInLane struct {
	address netip.Prefix
	lane    int
}

func newStrangers(memberAddr func(netip.Addr) bool) *strangers {
	s := &strangers{memberAddr: memberAddr}
	for i := range lanes {
		s.limiters[i] = rate.NewLimiter(lanePerSecond, laneAtOnce)
		s.running[i] = make(chan struct{}, laneRunning)
	}
	s.addresses.MaxEntries, s.refused.MaxEntries, s.limited.MaxEntries = maxStrangers, maxStrangers, maxStrangers
	return s
}

// enter waits until a question about the node may be asked. The caller calls leave
// after the answer. The error wraps ErrRefused for a node that was refused a moment
// ago, and ErrTooMany if the wait would be too long.
func (s *strangers) enter(ctx context.Context, node key.NodePublic, addr netip.Addr) (leave func(), err error) {
	lane, wait, err := s.reserve(node, addr, time.Now())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, maxWait)
	defer cancel()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
	if !acquire(ctx, s.running[lane]) {
		return nil, s.tooMany(node, time.Now())
	}
	return func() { <-s.running[lane] }, nil
}

// reserve takes a question from the lane with the shortest wait.
func (s *strangers) reserve(node key.NodePublic, addr netip.Addr, now time.Time) (lane int, wait time.Duration, err error) {
	isMember := s.memberAddr != nil && s.memberAddr(addr)
	s.mu.Lock()
	defer s.mu.Unlock()
	own := firstLane
	if at, ok := s.refused.GetOk(node); ok {
		own = refusedLane
		if age := now.Sub(at); age < refusedFor {
			return 0, 0, fmt.Errorf("%w; the sources are asked again in %s", ErrRefused, (refusedFor - age).Round(time.Millisecond))
		}
	} else if s.limited.Contains(node) {
		own = againLane
	}
	var total, ofAddress *rate.Limiter
	wait = maxWait + 1
	for _, i := range openTo[own] {
		if i == addressLane && !isMember {
			continue
		}
		of := s.ofAddress(addr, i)
		if d := max(delay(s.limiters[i], now), delay(of, now)); d < wait {
			lane, wait, total, ofAddress = i, d, s.limiters[i], of
		}
	}
	if total == nil {
		return 0, 0, s.tooManyLocked(node, now)
	}
	total.ReserveN(now, 1)
	ofAddress.ReserveN(now, 1)
	return lane, wait, nil
}

// ofAddress returns the limiter of an address in a lane. mu must be held.
func (s *strangers) ofAddress(addr netip.Addr, lane int) *rate.Limiter {
	of := addressInLane{network(addr), lane}
	l := s.addresses.Get(of)
	if l == nil {
		l = rate.NewLimiter(addressPerSecond, laneAtOnce)
		s.addresses.Set(of, l)
	}
	return l
}

// network returns what one user has: an IPv4 address, or the /64 of an IPv6 address.
func network(addr netip.Addr) netip.Prefix {
	addr = addr.Unmap()
	bits := addr.BitLen()
	if addr.Is6() {
		bits = 64
	}
	prefix, _ := addr.Prefix(bits) // the zero prefix without an address
	return prefix
}

// delay is the time until the limiter permits one more event.
func delay(l *rate.Limiter, now time.Time) time.Duration {
	missing := max(0, 1-l.TokensAt(now))
	return time.Duration(missing / float64(l.Limit()) * float64(time.Second))
}

// acquire takes a slot. It returns false if ctx ends first.
func acquire(ctx context.Context, slots chan struct{}) bool {
	select {
	case slots <- struct{}{}:
		return true
	default:
	}
	select {
	case slots <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

// tooMany notes that the attempt of a node exceeded the limits.
func (s *strangers) tooMany(node key.NodePublic, now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tooManyLocked(node, now)
}

func (s *strangers) tooManyLocked(node key.NodePublic, now time.Time) error {
	since, ok := s.limited.GetOk(node)
	switch {
	case !ok:
		s.limited.Set(node, now)
	case now.Sub(since) >= tooManyFor:
		return ErrTooManyForLong
	}
	return ErrTooMany
}

// remember stores that every source refuses the node.
func (s *strangers) remember(node key.NodePublic) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refused.Set(node, time.Now())
	s.limited.Delete(node)
}

// forget removes what is known of a node that a source admits.
func (s *strangers) forget(node key.NodePublic) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refused.Delete(node)
	s.limited.Delete(node)
}

// admitClient asks the sources about a node that connects. It asks the sources that
// are not local only within the limits of members and strangers.
func (g *Gate) admitClient(ctx context.Context, node key.NodePublic, addr netip.Addr) (decision, error) {
	answers, ok := g.askLocal(ctx, node, addr)
	if ok {
		return admitted, nil
	}
	if len(answers) == len(g.config.Sources) {
		return g.askOthers(ctx, node, addr, answers)
	}
	leave, err := g.enter(ctx, node, addr)
	switch {
	case err == nil:
		defer leave()
		return g.askOthers(ctx, node, addr, answers)
	case errors.Is(err, ErrRefused):
		return refused, notAdmitted(node, err)
	case g.memory.holds(node):
		return kept, nil
	}
	return limited, notAdmitted(node, err)
}

// enter waits until a question about the node may be asked.
func (g *Gate) enter(ctx context.Context, node key.NodePublic, addr netip.Addr) (leave func(), err error) {
	if !g.memory.knows(node) {
		return g.strangers.enter(ctx, node, addr)
	}
	ctx, cancel := context.WithTimeout(ctx, memberWait)
	defer cancel()
	if !acquire(ctx, g.members) {
		return nil, ErrTooMany
	}
	return func() { <-g.members }, nil
}
