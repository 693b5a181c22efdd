//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"tailscale.com/derp"
	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

const (
	memberCount   = 100
	memberEvery   = 100 * time.Millisecond // between two packets of a member
	membersWithin = 30 * time.Second
	memberSize    = 256 // bytes of a packet

	// lateAfter is the time after which a packet counts as lost.
	lateAfter = 5 * time.Second

	keyLen     = 32
	stampLen   = 16 // of a packet: its phase and its time
	noiseEvery = 10 * time.Millisecond
)

// members are admitted clients that send packets to each other at a steady rate, from
// addresses that no attacker has. They measure loss and delay in phases.
type members struct {
	clients []*testrelay.Client
	keys    []key.NodePrivate
	ended   atomic.Int64 // connections that ended

	mu     sync.Mutex
	phases []*phase // a packet carries the index of its phase; guarded by mu

	cancel context.CancelFunc
	done   sync.WaitGroup
}

// phase counts the packets that are sent during a time.
type phase struct {
	endedBefore  int64 // connections that ended before the phase
	sent, gotten atomic.Int64

	mu     sync.Mutex
	delays []time.Duration // of packets
	noise  []time.Duration // of datagrams of this process to itself
}

// traffic is what the members saw during a phase.
type traffic struct {
	Sent, Lost    int64
	Disconnected  int64 // connections that ended
	P50, P99, Max time.Duration
	// Noise is the p99 delay of datagrams that this process sent to itself at the
	// same time. The machine alone causes it.
	Noise time.Duration
}

// memberAddr returns the address of a member.
func memberAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{127, 200, byte(i / 250), byte(1 + i%250)})
}

// members connects clients that the source, if there is one, admits. They send from
// now on, and end with the row.
func (l *lab) members(ctx context.Context, r *relay, s *source, count int) (*members, error) {
	m := &members{keys: make([]key.NodePrivate, count), clients: make([]*testrelay.Client, count)}
	for i := range m.keys {
		m.keys[i] = key.NewNode()
		if s != nil {
			s.admit(true, m.keys[i].Public())
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i := range m.clients {
		g.Go(func() (err error) {
			// A relay that asks about few new nodes at once turns some away.
			for begun := time.Now(); ; {
				if m.clients[i], err = testrelay.Dial(gctx, r.Target(), m.keys[i], memberAddr(i)); err == nil {
					return nil
				}
				if time.Since(begun) > membersWithin || testrelay.Wait(gctx, memberEvery) != nil {
					return fmt.Errorf("connecting member %d of %d: %w", i+1, count, err)
				}
			}
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	ctx, m.cancel = context.WithCancel(ctx)
	l.onClose(m.close)
	m.begin()
	noise, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, err
	}
	context.AfterFunc(ctx, func() { _ = noise.Close() })
	m.done.Go(func() { m.sendNoise(ctx, noise) })
	m.done.Go(func() { m.receiveNoise(noise) })
	for i := range m.clients {
		m.done.Go(func() { m.receive(ctx, i) })
		m.done.Go(func() { m.send(ctx, i) })
	}
	return m, nil
}

func (m *members) close() {
	m.cancel()
	for _, c := range m.clients {
		_ = c.Conn.NetConn().Close() // without TLS's close message, which may wait for a write
	}
	m.done.Wait()
}

// pace calls f at each due time, and passes that time. A late call is followed by the
// next one at once, so that a stall counts for each packet that it delays.
func pace(ctx context.Context, first, every time.Duration, f func(due time.Time) error) {
	for due := time.Now().Add(first); ; due = due.Add(every) {
		if left := time.Until(due); left > 0 && testrelay.Wait(ctx, left) != nil {
			return
		}
		if ctx.Err() != nil || f(due) != nil {
			return
		}
	}
}

// epoch is time 0 in the packets.
var epoch = time.Now()

func stamp(b []byte, number uint64, at time.Time) {
	binary.BigEndian.PutUint64(b, number)
	binary.BigEndian.PutUint64(b[8:], uint64(at.Sub(epoch)))
}

// send sends the packets of member i to the next member.
func (m *members) send(ctx context.Context, i int) {
	to := m.clients[(i+1)%len(m.clients)].Public
	frame := []byte{byte(derp.FrameSendPacket)}
	frame = binary.BigEndian.AppendUint32(frame, keyLen+memberSize)
	frame = to.AppendTo(frame)
	at := len(frame)
	frame = append(frame, make([]byte, memberSize)...)
	first := memberEvery * time.Duration(i) / time.Duration(len(m.clients))
	writable := true
	pace(ctx, first, memberEvery, func(due time.Time) error {
		p, number := m.now()
		stamp(frame[at:], number, due)
		p.sent.Add(1)
		// Packets of a connection that has ended are lost.
		if writable {
			_, err := m.clients[i].Conn.Write(frame)
			writable = err == nil
		}
		return nil
	})
}

// receive counts the packets to member i.
func (m *members) receive(ctx context.Context, i int) {
	reader := m.clients[i].Reader
	for {
		kind, length, err := derp.ReadFrameHeader(reader)
		if err == nil && kind == derp.FrameRecvPacket && length == keyLen+memberSize {
			var b []byte
			if b, err = reader.Peek(keyLen + stampLen); err == nil {
				m.got(b[keyLen:], func(p *phase, delay time.Duration) {
					p.delays = append(p.delays, delay)
					p.gotten.Add(1)
				})
			}
		}
		if err == nil {
			_, err = reader.Discard(int(length))
		}
		if err != nil {
			if ctx.Err() == nil {
				m.ended.Add(1)
			}
			return
		}
	}
}

// got counts a stamp in its phase.
func (m *members) got(b []byte, count func(*phase, time.Duration)) {
	now, number := time.Since(epoch), binary.BigEndian.Uint64(b)
	m.mu.Lock()
	if number >= uint64(len(m.phases)) {
		m.mu.Unlock()
		return
	}
	p := m.phases[number]
	m.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	count(p, now-time.Duration(binary.BigEndian.Uint64(b[8:])))
}

func (m *members) sendNoise(ctx context.Context, conn *net.UDPConn) {
	b := make([]byte, stampLen)
	pace(ctx, 0, noiseEvery, func(due time.Time) error {
		_, number := m.now()
		stamp(b, number, due)
		_, err := conn.WriteTo(b, conn.LocalAddr())
		return err
	})
}

func (m *members) receiveNoise(conn *net.UDPConn) {
	b := make([]byte, stampLen)
	for {
		if _, err := conn.Read(b); err != nil {
			return
		}
		m.got(b, func(p *phase, delay time.Duration) { p.noise = append(p.noise, delay) })
	}
}

// begin begins a new phase. It is the last one until the next call of begin or end.
func (m *members) begin() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.phases = append(m.phases, &phase{endedBefore: m.ended.Load()})
}

// now returns the phase that packets are sent in, and its number.
func (m *members) now() (*phase, uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	last := len(m.phases) - 1
	return m.phases[last], uint64(last)
}

// end ends the phase, and returns its traffic once its last packets have arrived or
// count as lost.
func (m *members) end(ctx context.Context) (traffic, error) {
	p, _ := m.now()
	m.begin()
	for deadline := time.Now().Add(lateAfter); time.Now().Before(deadline); {
		// A sender may be about to write its last packet.
		if err := testrelay.Wait(ctx, memberEvery/2); err != nil {
			return traffic{}, err
		}
		if p.gotten.Load() >= p.sent.Load() {
			break
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	t := traffic{Sent: p.sent.Load(), Disconnected: m.ended.Load() - p.endedBefore}
	t.Lost = t.Sent - p.gotten.Load()
	slices.Sort(p.delays)
	slices.Sort(p.noise)
	t.P50, t.P99, t.Max = quantile(p.delays, 0.5), quantile(p.delays, 0.99), quantile(p.delays, 1)
	t.Noise = quantile(p.noise, 0.99)
	return t, nil
}

// quantile returns the value that the given share of the sorted list does not exceed;
// 0 for an empty list.
func quantile(sorted []time.Duration, share float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(int(share*float64(len(sorted))), len(sorted)-1)]
}
