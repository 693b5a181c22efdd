// Package admit decides who may use the relay. Each source of admission is one
// file; the gate asks all of them side by side, the first yes wins, and
// whatever is not a yes refuses.
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
)

// askTimeout bounds one question to all sources. derpserver gives the whole
// question five seconds.
const askTimeout = 4 * time.Second

// ErrRefused is a source's clear no.
var ErrRefused = errors.New("unknown node key")

// Source is one authority on who may connect.
type Source struct {
	// Name is for logs and health: the kind and where it is.
	Name string

	// Ask returns nil for a yes and an error that wraps ErrRefused for a
	// no. Any other error means that the source cannot tell.
	Ask func(ctx context.Context, node key.NodePublic, addr netip.Addr) error
}

// Gate admits the nodes that at least one source knows. The zero number of
// sources admits nobody: an open relay has no gate.
type Gate struct {
	sources []Source
	log     zerolog.Logger

	mu   sync.Mutex
	down map[string]error // by source name, what is wrong with it; guarded by mu
}

// NewGate returns a gate before the given sources.
func NewGate(sources []Source, log zerolog.Logger) *Gate {
	return &Gate{sources: sources, log: log, down: make(map[string]error)}
}

// Admit returns nil if a source says yes, and otherwise an error with every
// source's answer.
func (g *Gate) Admit(ctx context.Context, node key.NodePublic, addr netip.Addr) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()

	type answer struct {
		source Source
		err    error
	}
	answers := make(chan answer, len(g.sources))
	for _, s := range g.sources {
		go func() { answers <- answer{s, s.Ask(ctx, node, addr)} }()
	}
	refusals := []error{fmt.Errorf("node %s is not admitted", node.ShortString())}
	for range g.sources {
		a := <-answers
		g.note(a.source.Name, a.err)
		if a.err == nil {
			return nil
		}
		refusals = append(refusals, fmt.Errorf("%s: %w", a.source.Name, a.err))
	}
	return errors.Join(refusals...)
}

// note keeps the state of a source, and logs it when it changes.
func (g *Gate) note(source string, err error) {
	if err == nil || errors.Is(err, ErrRefused) {
		err = nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	_, wasDown := g.down[source]
	switch {
	case err != nil && !wasDown:
		g.down[source] = err
		g.log.Warn().Err(err).Str("source", source).Msg("admission source unavailable: only nodes that another source knows are admitted")
	case err != nil:
		g.down[source] = err
	case wasDown:
		delete(g.down, source)
		g.log.Info().Str("source", source).Msg("admission source answers again")
	}
}

// Down returns what is wrong with the sources that could not answer when they
// were last asked, by source name.
func (g *Gate) Down() map[string]error {
	g.mu.Lock()
	defer g.mu.Unlock()
	down := make(map[string]error, len(g.down))
	for name, err := range g.down {
		down[name] = err
	}
	return down
}

// Sources returns the names of the sources.
func (g *Gate) Sources() []string {
	names := make([]string, len(g.sources))
	for i, s := range g.sources {
		names[i] = s.Name
	}
	return names
}
