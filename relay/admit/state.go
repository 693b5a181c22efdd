package admit

import (
	"context"
	"errors"
	"slices"
	"time"

	"tailscale.com/types/key"
)

// State is the state of one source at its last answer.
type State struct {
	Source string

	// AsOf is the age of the source's last answer, zero before the first.
	AsOf time.Time

	// Err is the reason why the source is unavailable; nil if it answers.
	Err error

	// Problem is the problem to fix of a source that still answers; nil if
	// there is none.
	Problem error
}

// setState stores the state of a source, and logs it when it changes.
func (g *Gate) setState(i int, asOf time.Time, err error) {
	if errors.Is(err, ErrRefused) {
		err = nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	state := &g.states[i]
	wasUnavailable := state.Err != nil
	state.Err = err
	if err == nil && !asOf.IsZero() {
		state.AsOf = asOf
	}
	switch {
	case err != nil && !wasUnavailable:
		g.config.Log.Warn().Err(err).Str("source", state.Source).Dur("grace_ms", g.config.Grace).
			Msg("admission source unavailable: unless another source admits a node, only nodes admitted within the grace may connect")
	case err == nil && wasUnavailable:
		g.config.Log.Info().Str("source", state.Source).Msg("admission source answers again")
	}
}

// States returns the state of every source. Local sources are asked first.
func (g *Gate) States() []State {
	for i, s := range g.config.Sources {
		if s.Local {
			g.ask(context.Background(), i, g.probe, loopback)
		}
	}
	g.mu.Lock()
	states := slices.Clone(g.states)
	g.mu.Unlock()
	for i, s := range g.config.Sources {
		if s.Problem != nil {
			states[i].Problem = s.Problem()
		}
	}
	return states
}

// Sources returns the names of the sources.
func (g *Gate) Sources() []string {
	names := make([]string, len(g.config.Sources))
	for i, s := range g.config.Sources {
		names[i] = s.Name
	}
	return names
}

// Counts are the numbers of decisions since the start.
type Counts struct {
	Admitted     uint64 // a source admitted the node
	Kept         uint64 // admitted by the grace, while a source was unavailable
	Refused      uint64 // every source refused the node
	Unavailable  uint64 // refused while a source was unavailable
	Limited      uint64 // refused without a question, because there were too many
	Disconnected uint64 // refused after it had connected
}

// Counts returns the numbers of decisions since the start.
func (g *Gate) Counts() Counts {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.counts
}

// LastLimited returns when a node was last refused without a question, because there
// were too many; zero for never.
func (g *Gate) LastLimited() time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.limited
}

// maxRefusedKeys limits the memory that refused nodes take between two
// summaries.
const maxRefusedKeys = 10_000

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
	case limited:
		g.counts.Limited++
		g.limited = time.Now()
	}
	if len(g.refusedKeys) < maxRefusedKeys {
		g.refusedKeys[node] = struct{}{}
	}
}

// takeRefusedKeys returns how many different nodes were refused since the last
// call.
func (g *Gate) takeRefusedKeys() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	defer clear(g.refusedKeys)
	return len(g.refusedKeys)
}
