package relay

import (
	"context"
	"slices"
	"sync/atomic"
	"time"

	"tailscale.com/types/key"
)

// NodeLimit is what one node may use. The zero value is no limit.
type NodeLimit struct {
	// Rate is the number of bytes per second that the node may send, on all its
	// connections together; 0 is no limit. The bytes of DERP frames count, without
	// TLS and WebSocket, and from the admission of the node on.
	Rate int64

	// Burst is the number of bytes that the node may send at once after a pause.
	Burst int

	// Connections is the number of connections of the node; 0 is no limit. One more
	// closes the oldest: mostly one of a network that the node has left.
	Connections int
}

const (
	// A node is told that it is slowed down when it has waited for slowedShare of
	// each second, for slowedAfter. Pauses of up to slowedPause do not count.
	slowedShare = time.Second / 4
	slowedAfter = 10
	slowedPause = 3

	// limitEvery is the interval, in seconds, at which the limits of connected nodes
	// are asked for again: tags and comments may have changed.
	limitEvery = 10

	// slowedTake limits the writes of texts to nodes that are slowed down.
	slowedTake = 3 * time.Second

	// maxParted limits the nodes without a connection whose pace is kept.
	maxParted = 10_000
)

// nodeLimits applies [Config.NodeLimit].
type nodeLimits struct {
	of      func(key.NodePublic) NodeLimit // nil: no node has a limit
	private key.NodePrivate                // opens the first frame of other nodes of the region
	meshKey key.DERPMesh                   // zero: no mesh

	nodes map[key.NodePublic]*limitedNode // guarded by sessions.mu

	// parted is the number of nodes without a connection. Their pace is kept until they
	// could send a whole burst again. With a new pace, each new connection would bring
	// another burst. Guarded by sessions.mu.
	parted int

	changed []*session // whose text may have to change; guarded by sessions.mu

	waits, waited atomic.Int64 // of all readers: number, and nanoseconds
	replaced      int64        // connections closed for a newer one; guarded by sessions.mu
}

// limitedNode is a node with its limit.
type limitedNode struct {
	sessions []*session // oldest first
	pace     *pace      // nil without a rate
	backlog  backlog
	mesh     bool // whether the node is another node of the region, which has no rate
}

// limit counts the connection of a node that was just admitted, and applies the limit
// of the node. Its first reads are past: the connection's own reader calls it.
func (all *sessions) limit(s *session) {
	node, _ := s.state()
	mesh := all.of != nil && all.isMesh(s, node)
	if first, ok := s.Conn.(*firstBytes); ok {
		first.bytes, first.closed = nil, true
	}
	all.mu.Lock()
	defer all.mu.Unlock()
	if !all.open[s] {
		return
	}
	n := all.nodes[node]
	if n == nil {
		n = new(limitedNode)
		all.nodes[node] = n
	} else if len(n.sessions) == 0 {
		all.parted--
	}
	n.sessions = append(n.sessions, s)
	s.backlog = &n.backlog
	n.mesh = n.mesh || mesh
	if all.of != nil {
		all.apply(n, all.of(node))
	}
}

// apply gives a node a limit. The caller holds all.mu.
func (all *sessions) apply(n *limitedNode, limit NodeLimit) {
	before := n.pace
	switch {
	case limit.Rate == 0 || n.mesh:
		n.pace = nil
	case !before.is(limit):
		n.pace = newPace(limit, before)
	}
	for _, s := range n.sessions {
		s.setPace(n.pace)
	}
	if before != nil && before != n.pace {
		close(before.replaced)
		if before.slowed.Load() {
			all.changed = append(all.changed, n.sessions...)
		}
	}
	if over := len(n.sessions) - limit.Connections; over > 0 && limit.Connections > 0 {
		all.replaced += int64(over)
		for _, oldest := range n.sessions[:over] {
			go func() { _ = oldest.close() }() // waits for TLS, up to five seconds
		}
		n.sessions = slices.Delete(n.sessions, 0, over)
	}
}

// keepsFirst reports whether a session keeps the client's first frame, up to its
// admission.
func (all *sessions) keepsFirst() bool {
	return all.teller != nil && len(all.teller.disallowApps) > 0 || all.of != nil && !all.meshKey.IsZero()
}

// isMesh reports whether the client is another node of the region: its first frame has
// the mesh key. Opening the frame costs as much as a key exchange, so it is done only
// on a relay with a mesh.
func (all *sessions) isMesh(s *session, node key.NodePublic) bool {
	if all.meshKey.IsZero() {
		return false
	}
	info, ok := s.info(all.private, node)
	return ok && all.meshKey.Equal(info.MeshKey)
}

// unlimit forgets a connection that has ended. The caller holds all.mu.
func (all *sessions) unlimit(s *session, node key.NodePublic) {
	n := all.nodes[node]
	if n == nil {
		return
	}
	i := slices.Index(n.sessions, s)
	if i < 0 {
		return
	}
	n.sessions = slices.Delete(n.sessions, i, i+1)
	switch {
	case len(n.sessions) > 0:
	case n.pace == nil || n.pace.isFull() || all.parted >= maxParted:
		delete(all.nodes, node)
	default:
		all.parted++
	}
}

// ApplyNodeLimits asks [Config.NodeLimit] again about every connected node.
func (r *Relay) ApplyNodeLimits() {
	all := r.sessions
	if all.of == nil {
		return
	}
	all.mu.Lock()
	nodes := make([]key.NodePublic, 0, len(all.nodes))
	for node := range all.nodes {
		nodes = append(nodes, node)
	}
	all.mu.Unlock()
	for _, node := range nodes {
		all.mu.Lock()
		if n := all.nodes[node]; n != nil && len(n.sessions) > 0 {
			all.apply(n, all.of(node))
		}
		all.mu.Unlock()
	}
}

// RunNodeLimits sends a text to nodes that are slowed down, takes it back afterwards, and
// calls [Relay.ApplyNodeLimits] from time to time, until ctx ends. It is not needed
// without a rate.
func (r *Relay) RunNodeLimits(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for i := 1; ; i++ {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if i%limitEvery == 0 {
			r.ApplyNodeLimits()
		}
		if list := r.sessions.lookAtPaces(); len(list) > 0 {
			ctx, cancel := context.WithTimeout(ctx, slowedTake)
			r.sessions.deliver(ctx, list)
			cancel()
		}
	}
}

// lookAtPaces updates which nodes are slowed down, each second. It returns the
// connections whose text may have to change.
func (all *sessions) lookAtPaces() []*session {
	all.mu.Lock()
	defer all.mu.Unlock()
	list := all.changed
	all.changed = nil
	for node, n := range all.nodes {
		switch {
		case n.pace == nil:
		case len(n.sessions) == 0:
			if n.pace.isFull() {
				delete(all.nodes, node)
				all.parted--
			}
		case n.pace.look():
			list = append(list, n.sessions...)
		}
	}
	return list
}

// look updates whether the node is slowed down, and reports whether it is or was.
func (p *pace) look() bool {
	was := p.slowed.Load()
	if time.Duration(p.waited.Swap(0)) >= slowedShare {
		p.busy, p.quiet = p.busy+1, 0
	} else if p.quiet++; p.quiet >= slowedPause {
		p.busy = 0
	}
	is := p.busy > slowedAfter
	p.slowed.Store(is)
	return is || was
}

// LimitedNodes are numbers about [Config.NodeLimit].
type LimitedNodes struct {
	Nodes  int // connected nodes with a rate
	Slowed int // of these, the ones that have been slowed down for ten seconds

	Waits    int64         // of a connection for the rate, since the start
	Waited   time.Duration // in these
	Replaced int64         // connections closed for a newer one of the same node, since the start
}

// LimitedNodes returns the numbers.
func (r *Relay) LimitedNodes() LimitedNodes {
	all := r.sessions
	all.mu.Lock()
	defer all.mu.Unlock()
	l := LimitedNodes{Waits: all.waits.Load(), Waited: time.Duration(all.waited.Load()), Replaced: all.replaced}
	for _, n := range all.nodes {
		if n.pace == nil || len(n.sessions) == 0 {
			continue
		}
		l.Nodes++
		if n.pace.slowed.Load() {
			l.Slowed++
		}
	}
	return l
}

// Connections returns the number of connections of a node, and whether it has been
// slowed down for ten seconds.
func (r *Relay) Connections(node key.NodePublic) (connections int, slowed bool) {
	r.sessions.mu.Lock()
	defer r.sessions.mu.Unlock()
	n := r.sessions.nodes[node]
	if n == nil {
		return 0, false
	}
	return len(n.sessions), n.pace != nil && n.pace.slowed.Load()
}
