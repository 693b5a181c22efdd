// Package admit decides who may use the relay. Each source of admission is one
// file; the gate asks all of them, the first yes wins, a no needs an answer
// from all, and while a source cannot tell, only nodes that were admitted not
// long ago stay welcome (known.go). Connected nodes are asked about again
// (recheck.go).
package admit

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"
)

// askTimeout bounds one question to all sources. derpserver gives the whole
// question five seconds.
const askTimeout = 4 * time.Second

// ErrRefused is a source's clear no.
var ErrRefused = errors.New("unknown node key")

// errUnavailable is a refusal that is no no: some source could not tell.
var errUnavailable = errors.New("no source knows this node, and not every source could tell")

// Source is one authority on who may connect.
type Source struct {
	// Name is for logs and health: the kind and where it is.
	Name string

	// Local says that Ask answers from memory, at once.
	Local bool

	// Ask returns nil for a yes and an error that wraps ErrRefused for a
	// no. Any other error means that the source cannot tell. The time is
	// that of what the source knows: now for an answer from afar, the time
	// of reading for a list. A yes with the zero time is not remembered.
	Ask func(ctx context.Context, node key.NodePublic, addr netip.Addr) (time.Time, error)

	// Run keeps what the source knows current until ctx ends, and calls
	// changed after that changed. Nil when there is nothing to do.
	Run func(ctx context.Context, changed func()) error

	// Trouble is what the operator should mend although the source can
	// tell, nil if there is nothing. Nil for sources that have no such.
	Trouble func() error
}

// Config is what a Gate needs.
type Config struct {
	Sources []Source

	// Grace is how long a node stays welcome after a source's last yes
	// while a source cannot tell.
	Grace time.Duration

	// Path is the file in which admitted nodes outlive a restart.
	Path string

	// Interval is how often connected nodes are asked about again; 0 is
	// never, but for lists, whose changes act at once.
	Interval time.Duration

	Log zerolog.Logger
}

// Gate admits the nodes that at least one source knows. The zero number of
// sources admits nobody: an open relay has no gate.
type Gate struct {
	config  Config
	known   *known
	changed chan struct{}
	probe   key.NodePublic // known to nobody; asks for the state of sources

	mu      sync.Mutex
	states  []State                     // by the index of the source; guarded by mu
	counts  Counts                      // guarded by mu
	strange map[key.NodePublic]struct{} // refused since the last summary, at most maxStrange; guarded by mu
}

// State is what one source said last.
type State struct {
	Source string

	// AsOf is the time of what the source knows, zero while it has said
	// nothing yet.
	AsOf time.Time

	// Err is why it cannot tell; nil if it can.
	Err error

	// Trouble is what to mend although it can tell.
	Trouble error
}

// Counts are the decisions since the start.
type Counts struct {
	Admitted     uint64 // a source said yes
	Kept         uint64 // admitted by the grace, since a source could not tell
	Refused      uint64 // all sources said no
	Unavailable  uint64 // refused since a source could not tell
	Disconnected uint64 // connected, and then refused
}

// NewGate returns a gate that remembers whom it admitted before the last
// restart. Its tasks begin with [Gate.Run].
func NewGate(c Config) *Gate {
	g := &Gate{
		config:  c,
		known:   loadKnown(c.Path, c.Grace, c.Log),
		changed: make(chan struct{}, 1),
		probe:   key.NewNode().Public(),
		states:  make([]State, len(c.Sources)),
		strange: make(map[key.NodePublic]struct{}),
	}
	for i, s := range c.Sources {
		g.states[i].Source = s.Name
	}
	return g
}

// Admit returns nil if the node may connect, and otherwise an error with every
// source's answer.
func (g *Gate) Admit(ctx context.Context, node key.NodePublic, addr netip.Addr) error {
	d, err := g.decide(ctx, node, addr)
	g.count(node, d)
	return err
}

// decision is what the gate makes of the answers.
type decision int

const (
	admitted decision = iota
	kept
	refused
	unavailable
)

// decide asks the sources about one node. Those that answer from memory come
// first: what they admit is no question to anybody else.
func (g *Gate) decide(ctx context.Context, node key.NodePublic, addr netip.Addr) (decision, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()

	answers := make(chan Answer, len(g.config.Sources))
	for i, s := range g.config.Sources {
		if !s.Local {
			continue
		}
		a := g.ask(ctx, i, node, addr)
		if a.Err == nil {
			g.known.admitted(node, a.AsOf)
			return admitted, nil
		}
		answers <- a
	}
	for i, s := range g.config.Sources {
		if !s.Local {
			go func() { answers <- g.ask(ctx, i, node, addr) }()
		}
	}
	errs := []error{fmt.Errorf("node %s is not admitted", node.ShortString())}
	var noes []Answer
	for range g.config.Sources {
		a := <-answers
		if a.Err == nil {
			g.known.admitted(node, a.AsOf)
			return admitted, nil
		}
		noes = append(noes, a)
		errs = append(errs, fmt.Errorf("%s: %w", a.Source, a.Err))
	}
	d := g.judge(node, noes)
	switch d {
	case kept:
		return kept, nil
	case refused:
		g.known.forget(node)
	case unavailable:
		errs = append(errs, errUnavailable)
	}
	return d, errors.Join(errs...)
}

// judge is the decision that follows from the answers of all sources.
func (g *Gate) judge(node key.NodePublic, answers []Answer) decision {
	told := true
	for _, a := range answers {
		if a.Err == nil {
			return admitted
		}
		told = told && errors.Is(a.Err, ErrRefused)
	}
	switch {
	case told:
		return refused
	case g.known.welcome(node):
		return kept
	}
	return unavailable
}

// Answer is what one source says about one node.
type Answer struct {
	Source string
	AsOf   time.Time // of what the source knows
	Err    error     // nil for a yes, ErrRefused for a no
}

// ask asks one source, and keeps its state.
func (g *Gate) ask(ctx context.Context, i int, node key.NodePublic, addr netip.Addr) Answer {
	s := g.config.Sources[i]
	asOf, err := s.Ask(ctx, node, addr)
	if !errors.Is(err, context.Canceled) { // another source was quicker
		g.note(i, asOf, err)
	}
	return Answer{s.Name, asOf, err}
}

// note keeps the state of a source, and logs it when it changes.
func (g *Gate) note(i int, asOf time.Time, err error) {
	if errors.Is(err, ErrRefused) {
		err = nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	state := &g.states[i]
	wasDown := state.Err != nil
	state.Err = err
	if err == nil && !asOf.IsZero() {
		state.AsOf = asOf
	}
	switch {
	case err != nil && !wasDown:
		g.config.Log.Warn().Err(err).Str("source", state.Source).Dur("grace_ms", g.config.Grace).
			Msg("admission source unavailable: nodes that no other source knows stay welcome for the grace if they were admitted before, and are refused otherwise")
	case err == nil && wasDown:
		g.config.Log.Info().Str("source", state.Source).Msg("admission source answers again")
	}
}

// here is the address of a node that is asked about without being connected.
var here = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// AskAll asks every source about one node, as if it connected from this host,
// and waits for all answers. It changes nothing; [Gate.Admit] would admit the
// node if the error is nil.
func (g *Gate) AskAll(ctx context.Context, node key.NodePublic) ([]Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	answers := make([]Answer, len(g.config.Sources))
	var asking sync.WaitGroup
	for i := range g.config.Sources {
		asking.Go(func() { answers[i] = g.ask(ctx, i, node, here) })
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

// States returns what each source said last. Lists are looked at now.
func (g *Gate) States() []State {
	for i, s := range g.config.Sources {
		if s.Local {
			g.ask(context.Background(), i, g.probe, here)
		}
	}
	g.mu.Lock()
	states := slices.Clone(g.states)
	g.mu.Unlock()
	for i, s := range g.config.Sources {
		if s.Trouble != nil {
			states[i].Trouble = s.Trouble()
		}
	}
	return states
}

// Counts returns the decisions since the start.
func (g *Gate) Counts() Counts {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.counts
}

// Sources returns the names of the sources.
func (g *Gate) Sources() []string {
	names := make([]string, len(g.config.Sources))
	for i, s := range g.config.Sources {
		names[i] = s.Name
	}
	return names
}

// maxStrange bounds what the gate remembers of strangers between two summaries.
const maxStrange = 10_000

func (g *Gate) count(node key.NodePublic, d decision) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch d {
	case admitted:
		g.counts.Admitted++
		return
	case kept:
		g.counts.Kept++
		return
	case refused:
		g.counts.Refused++
	case unavailable:
		g.counts.Unavailable++
	}
	if len(g.strange) < maxStrange {
		g.strange[node] = struct{}{}
	}
}

// takeStrange returns how many different nodes were refused since it was last
// called.
func (g *Gate) takeStrange() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	defer clear(g.strange)
	return len(g.strange)
}
