package node

import (
	"context"
	"fmt"
	"sync"
	"time"

	"derpd/healthz"
	"derpd/relay"
)

const (
	packetsSampled = time.Minute      // between two samples of the counters
	packetsWindow  = 10 * time.Minute // which health judges

	// dropsWarned is the share of dropped packets above which health warns.
	// Below leastDrops, one node that is off would be enough on a quiet relay.
	dropsWarned = 0.01
	leastDrops  = 100
)

// packets keeps the counters of the last packetsWindow.
type packets struct {
	count func() relay.Packets

	mu      sync.Mutex
	samples []packetSample // oldest first; guarded by mu
}

type packetSample struct {
	at time.Time
	relay.Packets
}

// run samples the counters until ctx ends.
func (p *packets) run(ctx context.Context) error { return repeat(ctx, packetsSampled, p.sample) }

// sample adds the present counters, and removes samples older than the window.
func (p *packets) sample() {
	now := packetSample{time.Now(), p.count()}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.samples = append(p.samples, now)
	for now.at.Sub(p.samples[0].at) > packetsWindow {
		p.samples = p.samples[1:]
	}
}

// since returns the numbers of packets since the oldest sample in the window, and
// the time since that sample.
func (p *packets) since() (relay.Packets, time.Duration) {
	now := p.count()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, old := range p.samples {
		if took := time.Since(old.at); took <= packetsWindow {
			now.Received -= old.Received
			for reason := range now.Dropped {
				now.Dropped[reason] -= old.Dropped[reason]
			}
			return now, took
		}
	}
	return relay.Packets{}, 0
}

// dropReasons explain derpserver's reasons.
var dropReasons = map[string]string{
	"unknown_dest":        "the destination is not connected to this relay: it is off, or it is connected to another node of this region without a mesh",
	"unknown_dest_on_fwd": "another node of the mesh forwarded packets for a node that is not connected here",
	"gone_disconnected":   "the destination disconnected before its packets were sent",
	"queue_head":          "the queue of the destination was full: the link to it is slower than the traffic for it",
	"queue_tail":          "the queue of the destination was full: the link to it is slower than the traffic for it",
	"large_backlog":       "packets above 2 KiB waited for a destination whose link is slower than the traffic for it",
	"write_error":         "the connection to the destination broke",
	"dup_client":          "two clients are connected with the same node key",
}

// checkPackets warns when clients lose packets in this relay.
func (n *Node) checkPackets(context.Context) healthz.Result {
	counted, took := n.packets.since()
	var dropped int64
	var main string
	for reason, count := range counted.Dropped {
		dropped += count
		if largest := counted.Dropped[main]; count > largest || count == largest && reason < main {
			main = reason
		}
	}
	line := fmt.Sprintf("%d of %d packets dropped in %s", dropped, counted.Received, took.Round(time.Second))
	if dropped < leastDrops || float64(dropped) <= dropsWarned*float64(counted.Received) {
		return healthz.Okf("%s", line)
	}
	return healthz.Warnf("%s, most for %s: %s", line, main, dropReasons[main])
}
