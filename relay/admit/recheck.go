package admit

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"tailscale.com/types/key"
)

const (
	// recheckAtOnce limits the concurrent questions of one recheck.
	recheckAtOnce = 16

	// summaryEvery is the time between log lines about refused clients.
	summaryEvery = 10 * time.Minute
)

// Clients gives access to the connected clients of the relay.
type Clients struct {
	List       func() map[key.NodePublic]netip.Addr
	Disconnect func(key.NodePublic) error
}

// Run keeps the sources current, and disconnects connected nodes that every
// source refuses, until ctx ends.
func (g *Gate) Run(ctx context.Context, clients Clients) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, s := range g.config.Sources {
		if s.Run != nil {
			group.Go(func() error { return s.Run(ctx, g.Changed) })
		}
	}
	group.Go(func() error {
		g.memory.run(ctx)
		return nil
	})
	group.Go(func() error {
		g.recheckLoop(ctx, clients)
		return nil
	})
	group.Go(func() error {
		g.summaryLoop(ctx)
		return nil
	})
	return group.Wait()
}

// Reload reads the files of all sources again, and returns them. Connected nodes are
// checked if a list changed.
func (g *Gate) Reload() []string {
	var files []string
	for _, s := range g.config.Sources {
		if s.Reload == nil {
			continue
		}
		file, changed := s.Reload()
		files = append(files, file)
		if changed {
			g.Changed()
		}
	}
	return files
}

// Changed starts a check of all connected nodes in Run.
func (g *Gate) Changed() {
	select {
	case g.changed <- struct{}{}:
	default:
	}
}

func (g *Gate) recheckLoop(ctx context.Context, clients Clients) {
	var tick <-chan time.Time // stays nil for an interval of 0
	if g.config.Interval > 0 {
		ticker := time.NewTicker(g.config.Interval)
		defer ticker.Stop()
		tick = ticker.C
	}
	for {
		// The first check is at the start, so that health shows an unavailable
		// source before the first client connects.
		if g.askSources(ctx) {
			g.Recheck(ctx, clients)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick:
		case <-g.changed:
		}
	}
}

// askSources asks all sources about a key that no source lists, so that the states
// of the sources stay current while no client connects. It reports whether a source
// answers. If no source answers, a recheck can refuse no node, and would only wait
// for timeouts.
func (g *Gate) askSources(ctx context.Context) bool {
	answers, _ := g.AskAll(ctx, g.probe)
	return slices.ContainsFunc(answers, func(a Answer) bool { return a.Err == nil || errors.Is(a.Err, ErrRefused) })
}

// Recheck asks about all connected nodes, and disconnects those that every
// source refuses. An unavailable source disconnects no node.
func (g *Gate) Recheck(ctx context.Context, clients Clients) {
	var asking errgroup.Group
	asking.SetLimit(recheckAtOnce)
	var mu sync.Mutex
	var refusedNow []key.NodePublic
	check := func(node key.NodePublic, addr netip.Addr) {
		if d, _ := g.decide(ctx, node, addr); d == refused {
			mu.Lock()
			refusedNow = append(refusedNow, node)
			mu.Unlock()
		}
	}
	allLocal := !slices.ContainsFunc(g.config.Sources, func(s Source) bool { return !s.Local })
	for node, addr := range clients.List() {
		if ctx.Err() != nil {
			break
		}
		if allLocal {
			check(node, addr)
			continue
		}
		asking.Go(func() error {
			check(node, addr)
			return nil
		})
	}
	_ = asking.Wait()
	for _, node := range refusedNow {
		if err := clients.Disconnect(node); err != nil {
			g.config.Log.Warn().Err(err).Str("node", node.ShortString()).Msg("node is no longer admitted, but could not be disconnected")
			continue
		}
		g.mu.Lock()
		g.counts.Disconnected++
		g.mu.Unlock()
		g.config.Log.Info().Str("node", node.ShortString()).Msg("node disconnected: no source admits it any longer")
	}
}

// summaryLoop periodically logs the number of refused clients in one line, because
// refused clients try again every few seconds.
func (g *Gate) summaryLoop(ctx context.Context) {
	ticker := time.NewTicker(summaryEvery)
	defer ticker.Stop()
	var before Counts
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now, nodes := g.Counts(), g.takeRefusedKeys()
		if nodes == 0 {
			continue
		}
		g.config.Log.Info().Int("nodes", nodes).
			Uint64("refused", now.Refused-before.Refused).
			Uint64("source_unavailable", now.Unavailable-before.Unavailable).
			Uint64("too_many_questions", now.Limited-before.Limited).
			Dur("within_ms", summaryEvery).
			Msg("clients refused")
		before = now
	}
}
