//go:build linux

package main

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"tailscale.com/net/stun"
)

const (
	stunBurst = 16 // requests of a burst, each of another client
	// burstAskers is the number of bursts under way at once, so that the server
	// always has another burst to answer.
	burstAskers  = 4
	keptRequests = 256 // requests created once and sent in turn, to keep the load cheap
	answerWithin = time.Second
	answerType   = 0x0101 // binding success response, RFC 8489 §5
	maxAnswer    = 128    // bytes
)

// asker sends bursts to a STUN server, one request of each client, and waits for all
// answers. It has one socket, and sends a burst with one system call. Each client has
// a different address, as real clients have, so the server needs one datagram for
// each answer.
type asker struct {
	conn  *net.UDPConn
	batch *ipv4.PacketConn

	ids      []stun.TxID
	requests []ipv4.Message // as many as ids
	next     int            // first of the next burst, in ids and requests

	answers []ipv4.Message // buffers for one burst

	// The burst that is under way.
	asked    []stun.TxID
	answered []bool
	missing  int // answers
	at       time.Time
}

func newAsker(server netip.AddrPort, clients int) (*asker, error) {
	conn, err := net.ListenUDP("udp4", nil)
	if err != nil {
		return nil, err
	}
	a := &asker{conn: conn, batch: ipv4.NewPacketConn(conn), answered: make([]bool, clients)}
	to := net.UDPAddrFromAddrPort(server)
	for i := range keptRequests {
		id := stun.NewTxID()
		from := ipv4.ControlMessage{Src: stunClient(i % clients)}
		a.ids = append(a.ids, id)
		a.requests = append(a.requests, ipv4.Message{Buffers: [][]byte{stun.Request(id)}, OOB: from.Marshal(), Addr: to})
	}
	for range clients {
		a.answers = append(a.answers, ipv4.Message{Buffers: [][]byte{make([]byte, maxAnswer)}})
	}
	return a, nil
}

// stunClient returns the loopback address of a client.
func stunClient(i int) net.IP { return net.IPv4(127, 2, 0, byte(1+i)) }

func (a *asker) close() { _ = a.conn.Close() }

// ask sends one request of each client.
func (a *asker) ask() error {
	clients := len(a.answered)
	if a.next+clients > len(a.ids) {
		a.next = 0
	}
	a.asked = a.ids[a.next : a.next+clients]
	requests := a.requests[a.next : a.next+clients]
	a.next += clients
	a.missing = clients
	clear(a.answered)
	a.at = time.Now()
	for len(requests) > 0 {
		n, err := a.batch.WriteBatch(requests, 0)
		if err != nil {
			return err
		}
		requests = requests[n:]
	}
	return nil
}

// take reads the answers that have arrived. With wait, it waits for the first answer.
// It ignores late answers to an earlier burst.
func (a *asker) take(wait bool) error {
	flags := unix.MSG_DONTWAIT
	if wait {
		flags = 0
		if err := a.conn.SetReadDeadline(a.at.Add(answerWithin)); err != nil {
			return err
		}
	}
	n, err := a.batch.ReadBatch(a.answers, flags)
	if errors.Is(err, unix.EAGAIN) {
		return nil
	} else if err != nil {
		return err
	}
	for _, answer := range a.answers[:n] {
		id, err := answerTo(answer.Buffers[0][:answer.N])
		if err != nil {
			return err
		}
		if at := slices.Index(a.asked, id); at >= 0 && !a.answered[at] {
			a.answered[at] = true
			a.missing--
		}
	}
	return nil
}

// answerTo returns the transaction ID of an answer. It does not parse the answer,
// because parsing would use as much CPU as the server.
func answerTo(b []byte) (stun.TxID, error) {
	const header, typeLen, lengthAndCookie = 20, 2, 6
	if len(b) < header || int(b[0])<<8|int(b[1]) != answerType {
		return stun.TxID{}, errors.New("not an answer to a STUN request")
	}
	return stun.TxID(b[typeLen+lengthAndCookie : header]), nil
}

// measureSTUN measures a STUN server for some time, with one request at a time
// or with bursts.
func measureSTUN(ctx context.Context, s *server, burst int, d time.Duration) (sample, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	count := 1
	if burst > 1 {
		count = burstAskers
	}
	askers := make([]*asker, count)
	for i := range askers {
		a, err := newAsker(s.STUN, burst)
		if err != nil {
			return nil, err
		}
		defer a.close()
		askers[i] = a
	}
	t := new(tally)
	g, gctx := errgroup.WithContext(ctx)
	spins := len(s.CPUs) > 0
	if spins {
		g.Go(func() error { return t.spin(gctx, askers) })
	} else {
		for _, a := range askers {
			g.Go(func() error { return t.wait(gctx, a) })
		}
	}
	u, out, err := observeWith(g, cancel, s, func() (interval, error) {
		return observe(gctx, s, d, func() uint64 {
			t.timed.Store(true) // first called after the warmup
			return t.answers.Load()
		})
	})
	if err != nil {
		return nil, err
	}
	if spins {
		delete(out, loadBusy) // always 1
	}
	out[answerRate] = u.count / u.span
	out[answersPer] = u.count / u.server
	out[lostPackets] = float64(t.lost.Load())
	out.setDelays(t.delays)
	return out, nil
}

// tally counts the answers to all askers.
type tally struct {
	answers, lost atomic.Uint64
	timed         atomic.Bool
	delays        []time.Duration // of single requests, which have one asker
}

// spin is the load when the load and the server have separate CPUs. spin never
// sleeps. The server would wake a sleeping load for each burst, and spend most of its
// time on that.
func (t *tally) spin(ctx context.Context, askers []*asker) error {
	for ctx.Err() == nil {
		for _, a := range askers {
			if a.missing == 0 {
				if err := a.ask(); err != nil {
					return err
				}
			}
			if err := a.take(false); err != nil {
				return err
			}
			t.count(a)
		}
	}
	return nil
}

// wait is the load of one asker when the load and the server share the CPUs. wait
// sleeps, so that the server gets the CPUs.
func (t *tally) wait(ctx context.Context, a *asker) error {
	for ctx.Err() == nil {
		if err := a.ask(); err != nil {
			return ended(ctx, err)
		}
		for a.missing > 0 {
			if err := a.take(true); err != nil && !isTimeout(err) {
				return ended(ctx, err)
			}
			t.count(a)
		}
	}
	return nil
}

// count counts a burst that is answered or has timed out.
func (t *tally) count(a *asker) {
	if a.missing == 0 {
		t.answers.Add(uint64(len(a.asked)))
		if len(a.asked) == 1 && t.timed.Load() {
			t.delays = append(t.delays, time.Since(a.at))
		}
	} else if time.Since(a.at) > answerWithin {
		t.lost.Add(uint64(a.missing))
		a.missing = 0
	}
}

func isTimeout(err error) bool {
	e, ok := errors.AsType[net.Error](err)
	return ok && e.Timeout()
}
