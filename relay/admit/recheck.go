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
	// atOnce bounds the questions that a recheck asks at the same time.
	atOnce = 16

	// summaryEvery is how often refused clients are told of in the log.
	summaryEvery = 10 * time.Minute
)

// Clients is who is connected, as the relay sees it.
type Clients struct {
	List       func() map[key.NodePublic]netip.Addr
	Disconnect func(key.NodePublic) error
}

// Run keeps the sources current, asks about connected nodes again, and
// disconnects those that are clearly refused, until ctx ends.
func (g *Gate) Run(ctx context.Context, clients Clients) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, s := range g.config.Sources {
		if s.Run != nil {
			group.Go(func() error { return s.Run(ctx, g.Changed) })
		}
	}
	group.Go(func() error {
		g.known.run(ctx)
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

// Changed makes Run ask about all connected nodes at once.
func (g *Gate) Changed() {
	select {
	case g.changed <- struct{}{}:
	default:
	}
}

func (g *Gate) recheckLoop(ctx context.Context, clients Clients) {
	var tick <-chan time.Time // never, if the interval is 0
	if g.config.Interval > 0 {
		ticker := time.NewTicker(g.config.Interval)
		defer ticker.Stop()
		tick = ticker.C
	}
	for {
		// Also at the start: health can tell who does not answer before the
		// first client comes.
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

// askSources asks all sources about a node that nobody knows: whether they
// answer is of interest also while no client comes. It reports whether one of
// them did: without any, nobody can be refused, and each question would wait
// in vain.
func (g *Gate) askSources(ctx context.Context) bool {
	answers, _ := g.AskAll(ctx, g.probe)
	return slices.ContainsFunc(answers, func(a Answer) bool { return a.Err == nil || errors.Is(a.Err, ErrRefused) })
}

// Recheck asks about all connected nodes, and disconnects those that every
// source refuses. A source that cannot tell is no reason to disconnect
// anybody.
func (g *Gate) Recheck(ctx context.Context, clients Clients) {
	var asking errgroup.Group
	asking.SetLimit(atOnce)
	var mu sync.Mutex
	var revoked []key.NodePublic
	check := func(node key.NodePublic, addr netip.Addr) {
		if d, _ := g.decide(ctx, node, addr); d == refused {
			mu.Lock()
			revoked = append(revoked, node)
			mu.Unlock()
		}
	}
	allLocal := g.allLocal()
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
	for _, node := range revoked {
		if err := clients.Disconnect(node); err != nil {
			g.config.Log.Warn().Err(err).Str("node", node.ShortString()).Msg("node is no longer admitted but was not disconnected")
			continue
		}
		g.mu.Lock()
		g.counts.Disconnected++
		g.mu.Unlock()
		g.config.Log.Info().Str("node", node.ShortString()).Msg("node disconnected: no source admits it any longer")
	}
}

func (g *Gate) allLocal() bool {
	for _, s := range g.config.Sources {
		if !s.Local {
			return false
		}
	}
	return true
}

// summaryLoop tells of refused clients, many in one line: a stranger tries
// again every few seconds.
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
		now, nodes := g.Counts(), g.takeStrange()
		if nodes == 0 {
			continue
		}
		g.config.Log.Info().Int("nodes", nodes).
			Uint64("refused", now.Refused-before.Refused).
			Uint64("source_unavailable", now.Unavailable-before.Unavailable).
			Dur("within_ms", summaryEvery).
			Msg("clients refused")
		before = now
	}
}
