// Package admit decides which nodes may use the relay. Each source of admission
// is one file. The gate asks every source about a node. It admits the node if any
// source does, and refuses the node if every source does. While a source is
// unavailable, the gate also admits nodes that a source admitted within the grace
// (memory.go). The gate checks connected nodes again (recheck.go), and limits the
// questions about nodes that it does not know (strangers.go).
//
// A new source is a file here with one constructor, and a file of
// cmd/derpd/internal/config with its variables.
package admit

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"

	"derpd/internal/caught"
)

// askTimeout limits one question to one source. derpserver limits the whole decision,
// with the wait for a question, to five seconds.
const askTimeout = 3 * time.Second

// errNoAnswer is the cause of a context that ended because a source had askTimeout and
// did not answer.
var errNoAnswer = fmt.Errorf("no answer within %s", askTimeout)

// errAbandoned means that the relay ended a question before its time. The source has
// not failed.
var errAbandoned = errors.New("question abandoned")

// abandoned reports whether ctx, that of a question, ended before its time.
func abandoned(ctx context.Context) bool {
	cause := context.Cause(ctx)
	return cause != nil && !errors.Is(cause, errNoAnswer)
}

// ErrRefused is the answer of a source that refuses a node.
var ErrRefused = errors.New("unknown node key")

// errUnavailable means that no source admitted the node, and at least one gave
// no answer.
var errUnavailable = errors.New("no source admits this node, and at least one source is unavailable")

// Source is one authority that admits or refuses nodes.
type Source struct {
	// Name is the kind of the source and its location, for logs and health.
	Name string

	// Local is true if Ask answers from memory, without waiting.
	Local bool

	// Ask returns nil to admit the node, and an error that wraps ErrRefused to
	// refuse it. Any other error means that the source is unavailable. The time
	// is the age of the answer: now for an answer over the network, the time of
	// reading for a list. The gate does not remember a node that was admitted
	// with the zero time.
	Ask func(ctx context.Context, node key.NodePublic, addr netip.Addr) (time.Time, error)

	// Run keeps the source's data current until ctx ends, and calls changed
	// after every change. It may be nil.
	Run func(ctx context.Context, changed func()) error

	// Reload reads the source's file again, and returns whether its data changed. It
	// may be nil.
	Reload func() (file string, changed bool)

	// Describe returns what the source says about a node that it admits, from memory,
	// without waiting. It may be nil.
	Describe func(key.NodePublic) (Description, bool)

	// Problem returns a problem that the operator should fix while the source
	// still answers, or nil. The function may be nil.
	Problem func() error
}

// Config holds the settings of a Gate.
type Config struct {
	Sources []Source

	// Grace is the time for which a node stays admitted after its last
	// admission, while a source is unavailable.
	Grace time.Duration

	// Path is the file that keeps admitted nodes over restarts.
	Path string

	// Interval is the time between two checks of the connected nodes. With 0
	// they are checked only at the start and when a source's list changes.
	Interval time.Duration

	// MemberAddr reports whether an admitted node came from the address lately. New
	// nodes at such an address have a part of the questions to themselves. It may be nil.
	MemberAddr func(netip.Addr) bool

	Log zerolog.Logger
}

// Gate admits the nodes that at least one source admits. A Gate without sources
// admits nobody. An open relay has no Gate at all.
type Gate struct {
	config    Config
	memory    *memory
	strangers *strangers
	members   chan struct{} // holds one element for each question about a member that connects
	changed   chan struct{}
	probe     key.NodePublic // a key that no source lists, to ask for the state of sources

	mu          sync.Mutex
	states      []State                     // by the index of the source; guarded by mu
	counts      Counts                      // guarded by mu
	limited     time.Time                   // when a node was last refused without a question; guarded by mu
	refusedKeys map[key.NodePublic]struct{} // since the last summary, at most maxRefusedKeys; guarded by mu
}

// NewGate returns a gate that remembers the nodes admitted before the last
// restart. [Gate.Run] starts its tasks.
func NewGate(c Config) *Gate {
	g := &Gate{
		config:      c,
		memory:      loadMemory(c.Path, c.Grace, c.Log),
		strangers:   newStrangers(c.MemberAddr),
		members:     make(chan struct{}, membersAtOnce),
		changed:     make(chan struct{}, 1),
		probe:       key.NewNode().Public(),
		states:      make([]State, len(c.Sources)),
		refusedKeys: make(map[key.NodePublic]struct{}),
	}
	for i, s := range c.Sources {
		g.states[i].Source = s.Name
	}
	return g
}

// Admit returns nil if the node may connect. Otherwise the error contains the
// answer of every source that was asked.
func (g *Gate) Admit(ctx context.Context, node key.NodePublic, addr netip.Addr) error {
	d, err := g.admitClient(ctx, node, addr)
	if d != unavailable || ctx.Err() == nil { // a client that left is no failure of a source
		g.count(node, d)
	}
	return err
}

// Remembers reports whether a source has admitted the node within the grace.
func (g *Gate) Remembers(node key.NodePublic) bool { return g.memory.holds(node) }

// IsUnavailable reports whether an error of [Gate.Admit] or [Gate.AskAll] means that
// a source gave no answer.
func IsUnavailable(err error) bool { return errors.Is(err, errUnavailable) }

// decision is the gate's result for one node.
type decision int

const (
	admitted decision = iota
	kept
	refused
	unavailable
	limited
)

// decide asks the sources about one node, without the limits of strangers. Local
// sources come first: if one of them admits the node, no other source is asked.
func (g *Gate) decide(ctx context.Context, node key.NodePublic, addr netip.Addr) (decision, error) {
	answers, ok := g.askLocal(ctx, node, addr)
	if ok {
		return admitted, nil
	}
	return g.askOthers(ctx, node, addr, answers)
}

// askLocal asks the local sources in turn, and reports whether one of them admits
// the node.
func (g *Gate) askLocal(ctx context.Context, node key.NodePublic, addr netip.Addr) (answers []Answer, ok bool) {
	for i, s := range g.config.Sources {
		if !s.Local {
			continue
		}
		a := g.ask(ctx, i, node, addr)
		if a.Err == nil {
			g.remember(node, a.AsOf)
			return nil, true
		}
		answers = append(answers, a)
	}
	return answers, false
}

// askOthers asks the sources that are not local, all at the same time. answers are
// those of the local sources.
func (g *Gate) askOthers(ctx context.Context, node key.NodePublic, addr netip.Addr, answers []Answer) (decision, error) {
	ctx, cancel := context.WithCancel(ctx) // the questions that are left after an admission
	defer cancel()
	results := make(chan Answer, len(g.config.Sources))
	for i, s := range g.config.Sources {
		if !s.Local {
			go func() { results <- g.ask(ctx, i, node, addr) }()
		}
	}
	for len(answers) < len(g.config.Sources) {
		a := <-results
		if a.Err == nil {
			g.remember(node, a.AsOf)
			return admitted, nil
		}
		answers = append(answers, a)
	}
	var errs []error
	for _, a := range answers {
		errs = append(errs, fmt.Errorf("%s: %w", a.Source, a.Err))
	}
	d := g.judge(node, answers)
	switch d {
	case kept:
		return kept, nil
	case refused:
		g.memory.forget(node)
		g.strangers.remember(node)
	case unavailable:
		errs = append(errs, errUnavailable)
	}
	return d, notAdmitted(node, errs...)
}

// remember stores that a source admits the node.
func (g *Gate) remember(node key.NodePublic, asOf time.Time) {
	g.memory.remember(node, asOf)
	g.strangers.forget(node)
}

func notAdmitted(node key.NodePublic, causes ...error) error {
	return errors.Join(append([]error{fmt.Errorf("node %s is not admitted", node.ShortString())}, causes...)...)
}

// judge returns the decision that follows from the answers of all sources.
func (g *Gate) judge(node key.NodePublic, answers []Answer) decision {
	allRefuse := true
	for _, a := range answers {
		if a.Err == nil {
			return admitted
		}
		allRefuse = allRefuse && errors.Is(a.Err, ErrRefused)
	}
	switch {
	case allRefuse:
		return refused
	case g.memory.holds(node):
		return kept
	}
	return unavailable
}

// Answer is the answer of one source about one node.
type Answer struct {
	Source string
	AsOf   time.Time // age of the answer
	Err    error     // nil if admitted, ErrRefused if refused, otherwise unavailable
}

// ask asks one source, and updates its state.
func (g *Gate) ask(ctx context.Context, i int, node key.NodePublic, addr netip.Addr) Answer {
	s := g.config.Sources[i]
	if !s.Local {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, askTimeout, errNoAnswer)
		defer cancel()
	}
	asOf, err := g.askSource(ctx, s, node, addr)
	if err == nil || errors.Is(err, ErrRefused) || !abandoned(ctx) {
		g.setState(i, asOf, err)
	}
	return Answer{s.Name, asOf, err}
}

// askSource asks a source. A panic is an error of the source: it runs on a goroutine
// whose panic would end the process.
func (g *Gate) askSource(ctx context.Context, s Source, node key.NodePublic, addr netip.Addr) (asOf time.Time, err error) {
	defer func() {
		if v := recover(); v != nil {
			caught.Panic(g.config.Log, "question to "+s.Name, v)
			asOf, err = time.Time{}, errors.New("a bug of derpd, which the log describes")
		}
	}()
	return s.Ask(ctx, node, addr)
}

// loopback is the address in questions about a node that is not connected.
var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// AskAll asks every source about one node, as if the node connected from this
// host, and waits for all answers. It changes nothing. [Gate.Admit] would admit
// the node if the error is nil.
func (g *Gate) AskAll(ctx context.Context, node key.NodePublic) ([]Answer, error) {
	answers := make([]Answer, len(g.config.Sources))
	var asking sync.WaitGroup
	for i := range g.config.Sources {
		asking.Go(func() { answers[i] = g.ask(ctx, i, node, loopback) })
	}
	asking.Wait()
	switch g.judge(node, answers) {
	case refused:
		return answers, ErrRefused
	case unavailable:
		return answers, errUnavailable
	}
	return answers, nil
}
