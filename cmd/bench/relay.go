//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"tailscale.com/derp"
	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

const (
	// window is the limit of packets under way from one sender. It is the length
	// of derpserver's queue for a client, so that no server drops packets.
	window       = 32
	largestBurst = 8

	// fixedRate is the rate of a lightly loaded relay, in packets per second.
	fixedRate = 10_000

	keyLen       = 32
	headerLen    = derp.FrameHeaderLen + keyLen // of a frame with a packet
	smallestSize = 16                           // of a packet: its number and its time
	warmup       = 200 * time.Millisecond
	pairWithin   = 5 * time.Second
)

// load describes the packets that are sent through a relay.
type load struct {
	size, pairs, burst int // bytes, senders, packets that are written at once
	rate               int // packets per second of all pairs; 0 is the maximum
	// alone sends each burst with a separate system call at the maximum rate.
	// Otherwise one call sends all bursts for which the window has room, each as
	// a TLS record. A busy server receives the same data either way. With a call
	// for each packet, the load is slower than a server.
	alone bool
	time  time.Duration
}

func (l load) name() string {
	how, burst := "all it can", "single packets"
	if l.rate > 0 {
		how = fmt.Sprintf("%d packets/s", l.rate)
	}
	switch {
	case l.burst > 1:
		burst = fmt.Sprintf("bursts of %d", l.burst)
	case l.alone:
		burst = "one by one"
	}
	return fmt.Sprintf("relay %d B, %d pairs, %s, %s", l.size, l.pairs, burst, how)
}

// pair is a sending and a receiving client. The frames are created once. A packet
// begins with its number and the time of sending.
type pair struct {
	from, to *client
	frames   []byte // one burst
	size     int    // of a packet, bytes
	next     uint64 // number of the next packet to send

	arrived  atomic.Uint64 // number of the last packet that arrived, plus 1
	received atomic.Uint64 // packets that arrived
	lost     atomic.Uint64 // packets that did not arrive
	wake     chan struct{} // receives after arrived has changed

	timed   *atomic.Bool // whether receive appends to delays
	delays  []time.Duration
	endedBy error // result of receive
}

// dialBusy connects a client that reads and writes in large pieces.
func dialBusy(ctx context.Context, s *server) (*client, error) {
	return dial(ctx, s, key.NewNode(), netip.Addr{}, true)
}

// newPair connects both clients, the receiving client with dialTo.
func newPair(ctx context.Context, s *server, l load, timed *atomic.Bool, dialTo func(context.Context, *server) (*client, error)) (*pair, error) {
	p := &pair{size: l.size, wake: make(chan struct{}, 1), timed: timed}
	var err error
	if p.from, err = dialBusy(ctx, s); err != nil {
		return nil, err
	}
	if p.to, err = dialTo(ctx, s); err != nil {
		p.from.close()
		return nil, err
	}
	if l.rate == 0 {
		// Whenever the sender waits, at least half a window is under way.
		if err := p.to.readAtLeast(min(window/2*(headerLen+l.size), bigBuffer/2)); err != nil {
			p.close()
			return nil, err
		}
	}
	for range l.burst {
		p.frames = appendFrame(p.frames, p.to.public, l.size)
	}
	return p, nil
}

func (p *pair) close() {
	p.from.close()
	p.to.close()
}

// appendFrame appends a frame that sends a packet of this size to a client.
func appendFrame(b []byte, to key.NodePublic, size int) []byte {
	b = append(b, byte(derp.FrameSendPacket))
	b = binary.BigEndian.AppendUint32(b, uint32(keyLen+size))
	b = to.AppendTo(b)
	return append(b, make([]byte, size)...)
}

// epoch is time 0 in the packets.
var epoch = time.Now()

// send writes one burst into the buffer of the sender, as one TLS record if it
// fits.
func (p *pair) send() error {
	now := uint64(time.Since(epoch))
	step := headerLen + p.size
	for at := headerLen; at < len(p.frames); at += step {
		binary.BigEndian.PutUint64(p.frames[at:], p.next)
		binary.BigEndian.PutUint64(p.frames[at+8:], now)
		p.next++
	}
	_, err := p.from.conn.Write(p.frames)
	return err
}

// saturate sends whenever the window has room, until ctx ends. It flushes each burst
// with alone, and otherwise all bursts that fit together.
func (p *pair) saturate(ctx context.Context, alone bool) error {
	burst := uint64(len(p.frames) / (headerLen + p.size))
	for ctx.Err() == nil {
		for p.next+burst-p.arrived.Load() > window {
			if err := p.from.flush(); err != nil {
				return ended(ctx, err)
			}
			select {
			case <-p.wake:
			case <-ctx.Done():
				return nil
			}
		}
		err := p.send()
		if err == nil && alone {
			err = p.from.flush()
		}
		if err != nil {
			return ended(ctx, err)
		}
	}
	return nil
}

// receive counts packets until the connection is closed.
func (p *pair) receive() error {
	var arrived uint64
	for {
		kind, length, err := derp.ReadFrameHeader(p.to.reader)
		if err != nil {
			return err
		}
		if kind == derp.FrameRecvPacket && int(length) == keyLen+p.size {
			b, err := p.to.reader.Peek(keyLen + smallestSize)
			if err != nil {
				return err
			}
			number := binary.BigEndian.Uint64(b[keyLen:])
			if number < arrived {
				return fmt.Errorf("packet %d came after packet %d", number, arrived-1)
			}
			if number > arrived {
				p.lost.Add(number - arrived)
			}
			arrived = number + 1
			if p.timed.Load() {
				p.delays = append(p.delays, time.Since(epoch)-time.Duration(binary.BigEndian.Uint64(b[keyLen+8:])))
			}
			p.received.Add(1)
		}
		if _, err := p.to.reader.Discard(int(length)); err != nil {
			return err
		}
		// Wake the sender once for all packets of a read, or for every burst.
		if p.to.reader.Buffered() < int(length) || arrived%largestBurst == 0 {
			p.arrived.Store(arrived)
			select {
			case p.wake <- struct{}{}:
			default:
			}
		}
	}
}

// pace sends bursts of all pairs in turn, at one rate for all pairs together.
func pace(ctx context.Context, pairs []*pair, l load) error {
	every := time.Duration(l.burst) * time.Second / time.Duration(l.rate)
	due := time.Now()
	for i := 0; ctx.Err() == nil; i++ {
		if wait := time.Until(due); wait > 0 {
			testrelay.Pause(wait)
		}
		p := pairs[i%len(pairs)]
		if err := errors.Join(p.send(), p.from.flush()); err != nil {
			return ended(ctx, err)
		}
		due = due.Add(every)
	}
	return nil
}

// ended returns nil for an error after the end of ctx, because the measurement itself
// has closed the connection.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// measureRelay measures a server that relays packets.
func measureRelay(ctx context.Context, s *server, l load) (sample, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var timed atomic.Bool
	pairs := make([]*pair, 0, l.pairs)
	var receivers sync.WaitGroup
	defer receivers.Wait()
	closeAll := func() {
		for _, p := range pairs {
			p.close()
		}
	}
	defer closeAll()
	for range l.pairs {
		p, err := newPair(ctx, s, l, &timed, dialBusy)
		if err != nil {
			return nil, err
		}
		pairs = append(pairs, p)
		receivers.Go(func() { p.endedBy = p.receive() })
	}

	g, gctx := errgroup.WithContext(ctx)
	// Closing ends writes to a server that does not read. The connections must be
	// closed after the end of gctx, so that [ended] ignores the errors of these
	// writes.
	stop := context.AfterFunc(gctx, closeAll)
	defer stop()
	if l.rate > 0 {
		g.Go(func() error { return pace(gctx, pairs, l) })
	} else {
		for _, p := range pairs {
			g.Go(func() error { return p.saturate(gctx, l.alone) })
		}
	}
	arrived := func() (n uint64) {
		// First called after the warmup.
		timed.Store(l.rate > 0)
		for _, p := range pairs {
			n += p.received.Load()
		}
		return n
	}
	var systemCalls float64
	u, out, err := observeWith(g, cancel, s, func() (interval, error) {
		u, err := observe(gctx, s, l.time, arrived)
		if err == nil && l.rate == 0 {
			systemCalls, err = countSystemCalls(gctx, s, arrived)
		}
		return u, err
	})
	closeAll()
	receivers.Wait()

	var delays []time.Duration
	var lost uint64
	for i, p := range pairs {
		if p.received.Load() == 0 {
			return nil, errors.Join(err, fmt.Errorf("pair %d of %d passed no packet; its receiver ended with: %w", i+1, len(pairs), p.endedBy))
		}
		lost += p.lost.Load()
		delays = append(delays, p.delays...)
	}
	if err != nil {
		return nil, err
	}
	out[cpuPerPacket] = u.server / u.count * 1e6
	out[cpuPerByte] = u.server / (u.count * float64(l.size)) * 1e9
	out[callsPer] = u.calls / u.count
	out[lostPackets] = float64(lost)
	if l.rate == 0 {
		out[packetRate] = u.count / u.span
	}
	if systemCalls > 0 {
		out[systemCallsPer] = systemCalls
	}
	out.setDelays(delays)
	return out, nil
}

// perfTime is the time for which system calls are counted. They are counted last,
// because counting slows the server.
const perfTime = 200 * time.Millisecond

// countSystemCalls returns the server's system calls for each packet, as perf
// counts them. It returns 0 where perf is missing or not allowed.
func countSystemCalls(ctx context.Context, s *server, arrived func() uint64) (float64, error) {
	perf, err := exec.LookPath("perf")
	if err != nil {
		return 0, nil
	}
	before, began := arrived(), time.Now()
	out, err := exec.CommandContext(ctx, perf, "stat", "--field-separator", ",", "--event", "raw_syscalls:sys_enter",
		"--pid", strconv.Itoa(s.PID), "--timeout", strconv.FormatInt(perfTime.Milliseconds(), 10)).CombinedOutput()
	if err != nil {
		return 0, ctx.Err()
	}
	rate := float64(arrived()-before) / time.Since(began).Seconds()
	count, err := parsePerf(string(out))
	if err != nil {
		return 0, nil
	}
	if rate == 0 {
		return 0, errors.New("no packet arrived while system calls were counted")
	}
	return count / perfTime.Seconds() / rate, nil
}

// parsePerf finds the count in the output of perf stat.
func parsePerf(out string) (float64, error) {
	for line := range strings.Lines(out) {
		fields := strings.Split(line, ",")
		if len(fields) > 2 && strings.HasPrefix(fields[2], "raw_syscalls:") {
			return strconv.ParseFloat(fields[0], 64)
		}
	}
	return 0, errors.New("no count of system calls")
}
