//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
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
	answered []bool    // of the burst
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

// ask sends one burst and returns when every request of it was answered.
func (a *asker) ask() error {
	if a.next+a.burst > len(a.ids) {
		a.next = 0
	}
	ids := a.ids[a.next : a.next+a.burst]
	requests := a.requests[a.next*a.requestLen() : (a.next+a.burst)*a.requestLen()]
	a.next += a.burst
	clear(a.answered)
	if _, err := a.conn.Write(requests); err != nil {
		return err
	}
	if err := a.conn.SetReadDeadline(time.Now().Add(answerWithin)); err != nil {
		return err
	}
	for missing := a.burst; missing > 0; {
		n, err := a.receive()
		if err != nil {
			return fmt.Errorf("%d of %d requests were not answered: %w", missing, a.burst, err)
		}
		for i := range n {
			id, err := answerTo(a.answers[i][:a.messages[i].length])
			if err != nil {
				return err
			}
			// What comes late belongs to a burst that was given up.
			if at := slices.Index(ids, id); at >= 0 && !a.answered[at] {
				a.answered[at] = true
				missing--
			}
		}
	}
	return nil
}

// receive takes all answers that are there, and waits for the first.
func (a *asker) receive() (n int, err error) {
	var number syscall.Errno
	err = a.raw.Read(func(fd uintptr) bool {
		var r uintptr
		r, _, number = unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&a.messages[0])), uintptr(len(a.messages)), unix.MSG_DONTWAIT, 0, 0)
		n = int(r)
		return number != unix.EAGAIN
	})
	if err == nil && number != 0 {
		err = os.NewSyscallError("recvmmsg", number)
	}
	return n, err
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
	askers := 1
	if burst > 1 {
		askers = burstAskers
	}
	var answers, lost atomic.Uint64
	var timed atomic.Bool
	var delays []time.Duration // of the only asker
	g, gctx := errgroup.WithContext(ctx)
	for range askers {
		a, err := newAsker(s.stun, burst)
		if err != nil {
			return nil, err
		}
		defer a.close()
		g.Go(func() error {
			for gctx.Err() == nil {
				begin := time.Now()
				switch err := a.ask(); {
				case errors.Is(err, context.DeadlineExceeded), isTimeout(err):
					lost.Add(1)
				case err != nil:
					return ended(gctx, err)
				default:
					answers.Add(uint64(burst))
					if askers == 1 && timed.Load() {
						delays = append(delays, time.Since(begin))
					}
				}
			}
			return nil
		})
	}
	var u interval
	g.Go(func() (err error) {
		defer cancel()
		u, err = observe(gctx, s, d, func() uint64 {
			timed.Store(true) // after the warming up
			return answers.Load()
		})
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	out, err := u.sample(s)
	if err != nil {
		return nil, err
	}
	out[answerRate] = u.count / u.span
	out[answersPer] = u.count / u.server
	out[lostPackets] = float64(lost.Load())
	if len(delays) > 0 {
		slices.Sort(delays)
		out[delayMedian] = quantile(delays, 0.50).Seconds() * 1e3
		out[delayP99] = quantile(delays, 0.99).Seconds() * 1e3
	}
	return out, nil
}

func isTimeout(err error) bool {
	e, ok := errors.AsType[net.Error](err)
	return ok && e.Timeout()
}
