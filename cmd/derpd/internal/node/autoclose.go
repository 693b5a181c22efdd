package node

import (
	"context"
	"time"

	"golang.org/x/sync/errgroup"

	"derpd/cmd/derpd/internal/config"
	"derpd/relay/admit"
)

// With DERP_VERIFY_CLIENTS=auto a relay without any source is open while no socket of
// tailscaled exists. tailscaled may start after derpd, so the relay closes when anything
// appears at the path of a socket.
//
// A file or a directory closes the relay too, because the operator meant a socket. The
// relay stays closed while the process lives, also when tailscaled stops.
const (
	// socketInterval is the interval of the checks for a socket.
	socketInterval = 2 * time.Second

	// listTime is the time for the list of clients to fill, after the relay has closed.
	listTime = time.Second

	// evictAfter is added to DERP_VERIFY_INTERVAL. At the end of both, connections from
	// before the relay closed end, unless a source has admitted their node.
	evictAfter = 5 * time.Second
)

// closedLate describes a relay that has closed.
const closedLate = "closed since a tailscaled socket appeared (DERP_VERIFY_CLIENTS=auto), and open until then; set DERP_VERIFY_CLIENTS=true to be closed from the start"

// mayClose reports whether an open relay closes when a socket appears.
func (n *Node) mayClose() bool { return len(n.config.Later) > 0 }

// closeWithSocket waits until a socket of tailscaled appears, closes the relay, and
// then runs its gate.
func (n *Node) closeWithSocket(ctx context.Context) error {
	appeared, ok := n.awaitSocket(ctx)
	if !ok {
		return nil
	}
	gate, err := n.newGate(n.config.Later)
	if err != nil {
		return err
	}
	n.gate.Store(gate)
	n.log.Warn().Str("socket", appeared).Strs("sources", gate.Sources()).Str("fix", "set DERP_VERIFY_CLIENTS=true, to be closed from the start").
		Msg("only admitted nodes may use this relay from now on: a tailscaled socket has appeared, and DERP_VERIFY_CLIENTS is auto")
	group, ctx := errgroup.WithContext(ctx)
	// An open relay keeps no list of its clients, which takes memory for each. The first
	// check of the gate needs the list.
	group.Go(func() error { return n.relay.Run(ctx) })
	group.Go(func() error {
		select {
		case <-time.After(listTime):
			return n.runGate(ctx, gate)
		case <-ctx.Done():
			return nil
		}
	})
	group.Go(func() error { n.evict(ctx, gate); return nil })
	return group.Wait()
}

// awaitSocket returns the first path that exists, or false when ctx ends.
func (n *Node) awaitSocket(ctx context.Context) (path string, ok bool) {
	tick := time.NewTicker(socketInterval)
	defer tick.Stop()
	for {
		for _, s := range n.config.Later {
			if !config.IsMissing(s.Target) {
				return s.Target, true
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return "", false
		}
	}
}

// evict ends the connections of nodes that no source has admitted. A recheck would
// leave them connected for as long as the source does not answer.
func (n *Node) evict(ctx context.Context, gate *admit.Gate) {
	select {
	case <-time.After(n.config.Admission.Interval + evictAfter):
	case <-ctx.Done():
		return
	}
	count := 0
	for node := range n.connected() {
		if !gate.Remembers(node) && n.relay.Disconnect(node) == nil {
			count++
		}
	}
	if count > 0 {
		n.log.Info().Int("nodes", count).Msg("nodes disconnected that had connected while the relay was open, and that no source has admitted since")
	}
}
