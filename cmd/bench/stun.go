//go:build linux

package main

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"tailscale.com/net/stun"
)

const (
	stunBurst    = 16
	burstAskers  = 4   // so that the server has the next burst before it is through
	keptRequests = 256 // made once, and asked in turn: making one costs more than answering it
	answerWithin = time.Second
	answerType   = 0x0101 // binding success response, RFC 8489 §5
	maxAnswer    = 128    // bytes
)

// asker asks a STUN server, some requests at a time that leave and arrive
// together, and waits for all answers.
type asker struct {
	conn  *net.UDPConn
	raw   syscall.RawConn
	burst int

	requests []byte // one after the other
	ids      []stun.TxID
	next     int // request

	answers  [][]byte
	messages []message // of answers

	// The burst that is under way.
	asked    []stun.TxID
	answered []bool
	missing  int // answers
	at       time.Time
}

// message is the kernel's struct mmsghdr.
type message struct {
	header unix.Msghdr
	length uint32
}

func newAsker(server netip.AddrPort, burst int) (*asker, error) {
	conn, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(server))
	if err != nil {
		return nil, err
	}
	a := &asker{conn: conn, burst: burst, answered: make([]bool, burst), messages: make([]message, burst)}
	for range keptRequests {
		id := stun.NewTxID()
		a.ids = append(a.ids, id)
		a.requests = append(a.requests, stun.Request(id)...)
	}
	for i := range a.messages {
		b := make([]byte, maxAnswer)
		a.answers = append(a.answers, b)
		vector := &unix.Iovec{Base: &b[0]}
		vector.SetLen(len(b))
		a.messages[i].header.Iov = vector
		a.messages[i].header.SetIovlen(1)
	}
	if a.raw, err = conn.SyscallConn(); err == nil && burst > 1 {
		var failed error
		// What is written at once is cut into datagrams of this size by the
		// kernel, on the way to the server.
		err = a.raw.Control(func(fd uintptr) {
			failed = os.NewSyscallError("setting UDP_SEGMENT", unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, a.requestLen()))
		})
		err = errors.Join(err, failed)
	}
	if err != nil {
		a.close()
		return nil, err
	}
	return a, nil
}

func (a *asker) requestLen() int { return len(a.requests) / len(a.ids) }

func (a *asker) close() { _ = a.conn.Close() }

// ask sends one burst.
func (a *asker) ask() error {
	if a.next+a.burst > len(a.ids) {
		a.next = 0
	}
	a.asked = a.ids[a.next : a.next+a.burst]
	requests := a.requests[a.next*a.requestLen() : (a.next+a.burst)*a.requestLen()]
	a.next += a.burst
	a.missing = a.burst
	clear(a.answered)
	a.at = time.Now()
	_, err := a.conn.Write(requests)
	return err
}

// take takes the answers that are there; with wait, it waits until there are
// some. What comes late belongs to a burst that was given up.
func (a *asker) take(wait bool) error {
	n, err := a.receive(wait)
	if err != nil {
		return err
	}
	for i := range n {
		id, err := answerTo(a.answers[i][:a.messages[i].length])
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

// receive takes all answers that are there, and with wait it waits for the first.
func (a *asker) receive(wait bool) (n int, err error) {
	if wait {
		if err := a.conn.SetReadDeadline(a.at.Add(answerWithin)); err != nil {
			return 0, err
		}
	}
	var number syscall.Errno
	err = a.raw.Read(func(fd uintptr) bool {
		var r uintptr
		r, _, number = unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&a.messages[0])), uintptr(len(a.messages)), unix.MSG_DONTWAIT, 0, 0)
		n = int(r)
		return number != unix.EAGAIN || !wait
	})
	switch {
	case err != nil:
		return 0, err
	case number == unix.EAGAIN:
		return 0, nil
	case number != 0:
		return 0, os.NewSyscallError("recvmmsg", number)
	}
	return n, nil
}

// answerTo is which request an answer belongs to. What is in it is looked at by
// the test of this: parsing it would cost as much as the server's work.
func answerTo(b []byte) (stun.TxID, error) {
	const header, typeLen, lengthAndCookie = 20, 2, 6
	if len(b) < header || int(b[0])<<8|int(b[1]) != answerType {
		return stun.TxID{}, errors.New("not an answer to a STUN request")
	}
	return stun.TxID(b[typeLen+lengthAndCookie : header]), nil
}

// measureSTUN asks for some time, one request at a time or in bursts.
func measureSTUN(ctx context.Context, s *server, burst int, d time.Duration) (sample, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	count := 1
	if burst > 1 {
		count = burstAskers
	}
	askers := make([]*asker, count)
	for i := range askers {
		a, err := newAsker(s.stun, burst)
		if err != nil {
			return nil, err
		}
		defer a.close()
		askers[i] = a
	}
	t := new(tally)
	g, gctx := errgroup.WithContext(ctx)
	spins := len(s.cpus) > 0
	if spins {
		g.Go(func() error { return t.spin(gctx, askers) })
	} else {
		for _, a := range askers {
			g.Go(func() error { return t.wait(gctx, a) })
		}
	}
	u, out, err := observeWith(g, cancel, s, func() (interval, error) {
		return observe(gctx, s, d, func() uint64 {
			t.timed.Store(true) // after the warming up
			return t.answers.Load()
		})
	})
	if err != nil {
		return nil, err
	}
	if spins {
		delete(out, loadBusy) // whatever there is to do, it is all of the time
	}
	out[answerRate] = u.count / u.span
	out[answersPer] = u.count / u.server
	out[lostPackets] = float64(t.lost.Load())
	if len(t.delays) > 0 {
		slices.Sort(t.delays)
		out[delayMedian] = quantile(t.delays, 0.50).Seconds() * 1e3
		out[delayP99] = quantile(t.delays, 0.99).Seconds() * 1e3
	}
	return out, nil
}

// tally is what came of all requests.
type tally struct {
	answers, lost atomic.Uint64
	timed         atomic.Bool
	delays        []time.Duration // of single requests, which have one asker
}

// spin is the load on CPUs of its own. It never sleeps: a load that does has to
// be woken by the server, by an answer or more of each burst, and that is what
// most of the server's time would go to.
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

// wait is one asker of a load that shares its CPUs with the server, and must
// leave them to it.
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

// count looks whether a burst is through, or has to be given up.
func (t *tally) count(a *asker) {
	if a.missing == 0 {
		t.answers.Add(uint64(a.burst))
		if a.burst == 1 && t.timed.Load() {
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
