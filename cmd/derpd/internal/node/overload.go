package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"time"

	"derpd/relay"
)

// overloadRecent is the age up to which a refused handshake or connection explains a
// self-check that was too slow.
const overloadRecent = 15 * time.Second

// overload tells an overloaded relay from a broken one.
type overload struct {
	served     func() (clients, packets int64)
	handshakes func() relay.Handshakes
	limited    func() []relay.LimitCount
	refused    func() uint64 // connections closed at accept, because open files are short

	mu      sync.Mutex
	packets int64     // sent at the last judgement; guarded by mu
	files   uint64    // refused at the last judgement; guarded by mu
	short   time.Time // of the last judgement that saw more refused; guarded by mu
}

// judge returns the overload that explains the error of a self-check, or nil for a
// fault. An overload explains a timeout, or a socket that the kernel refuses, and no
// other error. A relay that passes no packet of its clients meanwhile has a fault.
func (o *overload) judge(err error) error {
	clients, packets := o.served()
	refused := o.refused()
	o.mu.Lock()
	defer o.mu.Unlock()
	passes := packets > o.packets
	o.packets = packets
	if refused > o.files {
		o.short = time.Now()
	}
	o.files = refused

	handshakes := o.handshakes()
	switch {
	case isShortage(err) && clients > 0:
		return fmt.Errorf("no socket for a check: %w; raise the limit of open files", err)
	case !errors.Is(err, context.DeadlineExceeded) || !passes:
		return nil
	case time.Since(handshakes.LastRefused) < overloadRecent:
		return fmt.Errorf("%d TLS handshakes refused since the start, %d wait: more clients or strangers connect than this machine has CPU for", handshakes.Refused, handshakes.Waiting)
	case slices.ContainsFunc(o.limited(), func(l relay.LimitCount) bool { return l.Within(overloadRecent) }):
		return errors.New("the limits of connections are reached: more clients or strangers connect than this machine has room for")
	case time.Since(o.short) < overloadRecent:
		return errors.New("connections are refused, because only the reserve of open files is left: raise the limit of open files")
	}
	return nil
}

// isShortage reports whether the kernel had no socket for a connection.
func isShortage(err error) bool {
	for _, errno := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// newOverload returns the judgement of this node.
func (n *Node) newOverload() *overload {
	return &overload{served: n.relay.Served, handshakes: n.relay.Handshakes, limited: func() []relay.LimitCount { return n.relay.Places().Limited }, refused: func() (all uint64) {
		for _, l := range n.listeners.retried {
			all += l.Refused()
		}
		return all
	}}
}
