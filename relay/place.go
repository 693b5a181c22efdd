package relay

import (
	"container/heap"
	"net"
	"net/netip"
	"time"
)

// place is the place of one connection. places.mu guards its fields.
type place struct {
	at    *address      // nil without a place
	since time.Duration // time of the last step, on the clock of the places, or sinceAdmitted
}

// sinceAdmitted is place.since of a connection whose node is admitted.
const sinceAdmitted time.Duration = -1

func (p place) admitted() bool { return p.since == sinceAdmitted }

// address is one address with a place. places.mu guards its fields.
type address struct {
	addr     netip.Addr    // zero for connections of a proxy or gateway
	waiting  []*socketConn // the one with the oldest step first
	attempts int           // half of the late attempts; see [places.mayCome]
	admitted int
	client   bool // whether a node was admitted from here
	known    bool // whether strangers cannot take its places
	index    int  // position in crowds, or -1
}

// weight is what an address takes: its waiting connections and its late attempts.
func (a *address) weight() int { return len(a.waiting) + a.attempts }

// crowds is a heap of addresses. The first has the largest weight. Among equals, the
// first has the connection with the oldest step.
type crowds []*address

// update puts an address where its connections belong.
func (h *crowds) update(a *address) {
	belongs := !a.known && len(a.waiting) > 0
	switch {
	case belongs && a.index < 0:
		heap.Push(h, a)
	case belongs:
		heap.Fix(h, a.index)
	case a.index >= 0:
		heap.Remove(h, a.index)
	}
}

// Len implements [heap.Interface].
func (h crowds) Len() int { return len(h) }

// Less implements [heap.Interface].
func (h crowds) Less(i, j int) bool {
	if a, b := h[i].weight(), h[j].weight(); a != b {
		return a > b
	}
	return oldestStep(h[i]) < oldestStep(h[j])
}

// oldestStep is the oldest step of an address. An address that leaves the heap has none.
func oldestStep(a *address) time.Duration {
	if len(a.waiting) == 0 {
		return 0
	}
	return a.waiting[0].place.since
}

// Swap implements [heap.Interface].
func (h crowds) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

// Push implements [heap.Interface].
func (h *crowds) Push(a any) {
	added := a.(*address)
	added.index = len(*h)
	*h = append(*h, added)
}

// Pop implements [heap.Interface].
func (h *crowds) Pop() any {
	last := len(*h) - 1
	a := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	a.index = -1
	return a
}

// addrPort returns the address and port of a TCP connection.
func addrPort(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	return plainAddr(tcp.AddrPort())
}
