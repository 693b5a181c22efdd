package relay

import (
	"math/bits"

	"tailscale.com/derp"
	"tailscale.com/tstime/mono"
	"tailscale.com/types/key"
)

const (
	// longestBacklog limits the memory of a node's large packets in derpserver, which
	// has two queues of 32 packets for each client. Longer backlogs drop packets.
	longestBacklog = 128 << 10

	// backlogForgotten is the time after which a backlog that does not change is
	// empty. derpserver has dropped its packets: 31 ordinary packets of each queue
	// may precede a large one, which are eight TLS records, and one record is being
	// written. Each write ends within writeTimeout and deadlineStep, 16 seconds.
	backlogForgotten = 9 * (writeTimeout + deadlineStep)
)

// backlog is the memory of the large packets for one node that derpserver has, with all
// connections of the node. It is guarded by sessions.mu.
type backlog struct {
	size    int
	changed mono.Time
}

// roomFor returns the memory of a packet: derpserver's buffers are powers of two.
func roomFor(length uint32) int { return 1 << bits.Len32(length-1) }

// queue notes a large packet for a node. It reports whether the packet must be dropped,
// or else returns the backlog, or nil if the node has no connection here.
func (all *sessions) queue(to key.NodePublic, size int) (b *backlog, drop bool) {
	all.mu.Lock()
	defer all.mu.Unlock()
	n := all.nodes[to]
	if n == nil || len(n.sessions) == 0 || size > derp.MaxPacketSize { // derpserver refuses longer packets
		return nil, false
	}
	b = &n.backlog
	now := mono.Now()
	if b.size+size > longestBacklog {
		if now.Sub(b.changed) < backlogForgotten {
			all.droppedLarge.Add(1)
			return nil, true
		}
		b.size = 0
	}
	b.size += size
	b.changed = now
	return b, false
}

// unqueue notes that derpserver no longer has a large packet.
func (all *sessions) unqueue(b *backlog, size int) {
	all.mu.Lock()
	defer all.mu.Unlock()
	if b == nil {
		return
	}
	b.size = max(0, b.size-size)
	b.changed = mono.Now()
}
