//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sync/errgroup"
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

// asker asks a STUN server, some requests at a time that leave with one system
// call, and waits for all answers.
type asker struct {
	conn     *net.UDPConn
	batch    *ipv4.PacketConn
	requests []ipv4.Message
	ids      []stun.TxID
	answers  []ipv4.Message
	at       int // next request
	burst    int
	known    map[stun.TxID]bool // of this burst; true when answered
}

func newAsker(server netip.AddrPort, burst int) (*asker, error) {
	conn, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(server))
	if err != nil {
		return nil, err
	}
	a := &asker{conn: conn, batch: ipv4.NewPacketConn(conn), burst: burst, known: map[stun.TxID]bool{}}
	for range keptRequests {
		id := stun.NewTxID()
		a.ids = append(a.ids, id)
		a.requests = append(a.requests, ipv4.Message{Buffers: [][]byte{stun.Request(id)}})
	}
	for range burst {
		a.answers = append(a.answers, ipv4.Message{Buffers: [][]byte{make([]byte, maxAnswer)}})
	}
	return a, nil
}

func (a *asker) close() { _ = a.conn.Close() }

// ask sends one burst and returns when every request of it was answered.
func (a *asker) ask() error {
	if a.at+a.burst > len(a.requests) {
		a.at = 0
	}
	clear(a.known)
	for _, id := range a.ids[a.at : a.at+a.burst] {
		a.known[id] = false
	}
	requests := a.requests[a.at : a.at+a.burst]
	a.at += a.burst
	for len(requests) > 0 {
		n, err := a.batch.WriteBatch(requests, 0)
		if err != nil {
			return err
		}
		requests = requests[n:]
	}
	if err := a.conn.SetReadDeadline(time.Now().Add(answerWithin)); err != nil {
		return err
	}
	for answered := 0; answered < a.burst; {
		n, err := a.batch.ReadBatch(a.answers, 0)
		if err != nil {
			return fmt.Errorf("%d of %d requests were answered: %w", answered, a.burst, err)
		}
		for _, answer := range a.answers[:n] {
			id, err := answerTo(answer.Buffers[0][:answer.N])
			if err != nil {
				return err
			}
			// What comes late belongs to a burst that was given up.
			if before, asked := a.known[id]; asked && !before {
				a.known[id] = true
				answered++
			}
		}
	}
	return nil
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
