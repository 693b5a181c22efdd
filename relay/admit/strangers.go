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
)

// Strangers are nodes that no source admitted within the grace. These limits keep
// the questions about strangers from being a load on the sources that are not local.
const (
	// QuestionsPerSecond and QuestionsAtOnce limit the questions about strangers:
	// the rate, and the questions that may come together after a pause.
	QuestionsPerSecond = 50
	QuestionsAtOnce    = 10

	// QuestionsRunning limits the concurrent questions about strangers. It is
	// half of urlAtOnce, so that members and rechecks always get an answer.
	QuestionsRunning = urlAtOnce / 2

	// refusedFor is the time for which a refusal answers the next attempts of the
	// same node. A node that was just added waits for this time at most.
	refusedFor = 3 * time.Second

	// A stranger waits for its question: newcomerWait at its first attempt. A
	// node that was refused within retryWindow waits for retryWait, and so leaves
	// room in the queue for new nodes. A new node whose question exceeded the
	// limits waits for againWait at its next attempt. A node with a new key for
	// each attempt cannot take its place.
	newcomerWait = time.Second
	retryWait    = newcomerWait / 2
	againWait    = newcomerWait * 3 / 2
	retryWindow  = 10 * time.Minute

	// maxRefusals limits the memory of refusals and of nodes that wait longer.
	maxRefusals = 10_000
)

// ErrTooMany is the error for a stranger whose question exceeds the limits. The node
// is refused, and no source was asked.
var ErrTooMany = errors.New("too many questions about unknown nodes; another attempt may succeed")

// strangers limits the questions about strangers, and remembers refusals.
type strangers struct {
	limiter *rate.Limiter
	running chan struct{} // holds one element for each running question

	mu      sync.Mutex
	refused map[key.NodePublic]time.Time // time of the last refusal, zero for a node that exceeded the limits; at most maxRefusals; guarded by mu
}

func newStrangers() *strangers {
	return &strangers{
		limiter: rate.NewLimiter(QuestionsPerSecond, QuestionsAtOnce),
		running: make(chan struct{}, QuestionsRunning),
		refused: make(map[key.NodePublic]time.Time),
	}
}

// enter waits until a question about the node may be asked. The caller calls leave
// after the answer. The error wraps ErrRefused for a node that was refused a moment
// ago, and ErrTooMany if the wait would be too long.
func (s *strangers) enter(ctx context.Context, node key.NodePublic) (leave func(), err error) {
	wait := newcomerWait
	at, ok := s.refusal(node)
	switch age := time.Since(at); {
	case !ok:
	case at.IsZero():
		wait = againWait
	case age < refusedFor:
		return nil, fmt.Errorf("%w; the sources are asked again in %s", ErrRefused, (refusedFor - age).Round(time.Millisecond))
	case age < retryWindow:
		wait = retryWait
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if err := s.limiter.Wait(ctx); err != nil {
		return nil, s.tooMany(node)
	}
	leave = func() { <-s.running }
	select {
	case s.running <- struct{}{}:
		return leave, nil
	default:
	}
	select {
	case s.running <- struct{}{}:
		return leave, nil
	case <-ctx.Done():
		return nil, s.tooMany(node)
	}
}

// tooMany notes that a new node exceeded the limits. A refused node stays one.
func (s *strangers) tooMany(node key.NodePublic) error {
	if _, ok := s.refusal(node); !ok {
		s.note(node, time.Time{})
	}
	return ErrTooMany
}

func (s *strangers) refusal(node key.NodePublic) (time.Time, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, ok := s.refused[node]
	return at, ok
}

// remember stores that every source refuses the node.
func (s *strangers) remember(node key.NodePublic) { s.note(node, time.Now()) }

// note stores an element of refused. A full table loses another element, which costs
// one question.
func (s *strangers) note(node key.NodePublic, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.refused[node]; !ok && len(s.refused) >= maxRefusals {
		for other := range s.refused {
			delete(s.refused, other)
			break
		}
	}
	s.refused[node] = at
}

// forget removes the refusal of a node that a source admits.
func (s *strangers) forget(node key.NodePublic) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.refused, node)
}

// admitClient asks the sources about a node that connects. It asks the sources that
// are not local only within the limits of strangers.
func (g *Gate) admitClient(ctx context.Context, node key.NodePublic, addr netip.Addr) (decision, error) {
	answers, ok := g.askLocal(ctx, node, addr)
	if ok {
		return admitted, nil
	}
	if len(answers) < len(g.config.Sources) && !g.memory.holds(node) {
		leave, err := g.strangers.enter(ctx, node)
		switch {
		case errors.Is(err, ErrTooMany):
			return limited, notAdmitted(node, err)
		case err != nil:
			return refused, notAdmitted(node, err)
		}
		defer leave()
	}
	return g.askOthers(ctx, node, addr, answers)
}
