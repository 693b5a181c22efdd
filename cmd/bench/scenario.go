//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"go4.org/mem"
	"golang.org/x/sync/errgroup"
	"tailscale.com/derp"
	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

const (
	pathWarmup = 3 * time.Second // time for congestion control to find its rate
	pathTime   = 5 * time.Second
)

// congestionControls are those that a path is measured with, where network namespaces
// may use them.
var congestionControls = []string{"cubic", "bbr"}

const allowedCongestionFile = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"

// allowedCongestion returns the congestion controls that a namespace may use.
func allowedCongestion() []string {
	b, err := os.ReadFile(allowedCongestionFile)
	if err != nil {
		return congestionControls
	}
	allowed := strings.Fields(string(b))
	return slices.DeleteFunc(slices.Clone(congestionControls), func(name string) bool { return !slices.Contains(allowed, name) })
}

// stream is packets from a sender to a receiver of a scenario.
type stream struct {
	size, rate int  // bytes of a packet, packets per second
	receiver   int  // streams with one number have one receiver
	farSender  bool // whether the sender is at the far end, and the receiver near the relay
	background bool // whether only its rate counts, and not its delay and loss
}

// scenario is a path with the traffic on it.
type scenario struct {
	name     string
	down, up link
	streams  []stream
}

// scenarios returns all scenarios. Queues of the slow ones are those of home routers.
func scenarios() []scenario {
	const mbit = 1e6 / 8
	slow := link{delay: 20 * time.Millisecond, rate: 5 * mbit, queue: 200 * time.Millisecond}
	fast := link{delay: slow.delay, rate: 100 * mbit, queue: 100 * time.Millisecond}
	fat := link{delay: 50 * time.Millisecond, rate: 100 * mbit, queue: 100 * time.Millisecond}
	lossyFat, long := fat, link{delay: 50 * time.Millisecond, rate: 50 * mbit, queue: 100 * time.Millisecond}
	lossyFat.loss = 0.001
	lossyLong := long
	lossyLong.loss = 0.01
	uplink := slow
	uplink.rate = 10 * mbit

	download := stream{size: 1280, rate: 800} // 8.2 Mbit/s, more than the slow link carries
	background := download
	background.background = true
	upload := download
	upload.farSender = true
	keystrokes := stream{size: 64, rate: 20}
	many := []stream{{size: 1280, rate: 2000, background: true}}
	for i := range 7 {
		many = append(many, stream{size: 1280, rate: 40, receiver: i + 1}) // 0.4 Mbit/s each
	}
	return []scenario{
		{"slow link", slow, fast, []stream{download}},
		{"slow link, mixed", slow, fast, []stream{background, keystrokes}},
		{"slow sender", fast, slow, []stream{upload}},
		{"long fat", fat, fat, []stream{{size: 1280, rate: 11000}}},
		{"long fat with losses", lossyFat, fat, []stream{{size: 1280, rate: 11000}}},
		{"a client far away", lossyLong, long, []stream{{size: 1280, rate: 2000}}},
		{"many on one uplink", uplink, fast, many},
	}
}

func (c scenario) title(congestion string) string { return c.name + ", " + congestion }

// flow is a stream while it is measured. The fields but sent are owned by the receiver.
type flow struct {
	stream
	from  *client
	frame []byte
	sent  uint64

	arrived  uint64        // number of the last packet, plus 1
	received atomic.Uint64 // packets
	timed    uint64        // packets of the measured time that arrived
	lost     uint64        // packets of the measured time that did not
	delays   []time.Duration
}

// send writes the next packet.
func (f *flow) send() error {
	binary.BigEndian.PutUint64(f.frame[headerLen:], f.sent)
	binary.BigEndian.PutUint64(f.frame[headerLen+8:], uint64(time.Since(epoch)))
	f.sent++
	if _, err := f.from.conn.Write(f.frame); err != nil {
		return err
	}
	return f.from.flush()
}

// pace sends packets at the rate of the stream, until ctx ends. After a write that
// waits, it sends no more than the rate, as a sender does that loses packets at its own
// socket.
func (f *flow) pace(ctx context.Context) error {
	every := time.Second / time.Duration(f.rate)
	for due := time.Now(); ctx.Err() == nil; due = due.Add(every) {
		if wait := time.Until(due); wait > 0 {
			testrelay.Pause(wait)
		} else if wait < -every {
			due = time.Now()
		}
		if err := f.send(); err != nil {
			return ended(ctx, err)
		}
	}
	return nil
}

// receive counts the packets of all flows to one client until its connection is closed.
func receive(to *client, flows map[key.NodePublic]*flow, timed *atomic.Bool) error {
	for {
		kind, length, err := derp.ReadFrameHeader(to.reader)
		if err != nil {
			return err
		}
		if kind == derp.FrameRecvPacket && length >= keyLen+smallestSize {
			b, err := to.reader.Peek(keyLen + smallestSize)
			if err != nil {
				return err
			}
			if f := flows[key.NodePublicFromRaw32(mem.B(b[:keyLen]))]; f != nil {
				f.take(binary.BigEndian.Uint64(b[keyLen:]), time.Duration(binary.BigEndian.Uint64(b[keyLen+8:])), timed.Load())
			}
		}
		if _, err := to.reader.Discard(int(length)); err != nil {
			return err
		}
	}
}

// take counts one packet.
func (f *flow) take(number uint64, sent time.Duration, timed bool) {
	if timed && number >= f.arrived {
		f.timed++
		f.lost += number - f.arrived
		if !f.background {
			f.delays = append(f.delays, time.Since(epoch)-sent)
		}
	}
	f.arrived = number + 1
	f.received.Add(1)
}

// measureScenario measures the rate that arrives, and the delay and the loss of the
// streams that are not in the background. It needs an empty network namespace, and
// creates another namespace for the far clients. This process carries the packets
// between the two.
func measureScenario(ctx context.Context, p *program, c scenario, congestion string) (sample, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	path, err := newPath(ctx, c.down, c.up)
	if err != nil {
		return nil, err
	}
	g, gctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(gctx, path.close)
	defer stop()
	defer path.close()
	g.Go(func() error { return ended(gctx, path.carry()) })
	if err := errors.Join(useCongestion(congestion), path.inFar(func() error { return useCongestion(congestion) })); err != nil {
		return nil, err
	}

	near := *p
	near.Address = pathNear
	near.Env = append(slices.Clip(p.Env), "DERP_TCP_CONGESTION="+congestion)
	s, err := near.Start(ctx)
	if err != nil {
		return nil, err
	}
	defer s.Stop()
	flows, receivers, err := connectFlows(ctx, s, path, c.streams)
	if err != nil {
		return nil, err
	}
	closeAll := func() {
		for _, f := range flows {
			f.from.close()
		}
		for _, r := range receivers {
			r.client.close()
		}
	}
	defer closeAll()
	stopEnds := context.AfterFunc(gctx, closeAll)
	defer stopEnds()

	var timed atomic.Bool
	for _, r := range receivers {
		g.Go(func() error { return ended(gctx, receive(r.client, r.flows, &timed)) })
	}
	for _, f := range flows {
		g.Go(func() error { return f.pace(gctx) })
	}
	u, out, err := observeWith(g, cancel, s, func() (interval, error) {
		if err := testrelay.Wait(gctx, pathWarmup); err != nil {
			return interval{}, err
		}
		timed.Store(true)
		return observe(gctx, s, pathTime, func() (bytes uint64) {
			for _, f := range flows {
				bytes += f.received.Load() * uint64(f.size)
			}
			return bytes
		})
	})
	if err != nil {
		return nil, err
	}
	out[arrivedRate] = u.count * 8 / 1e6 / u.span
	out[cpuPerByte] = u.server / u.count * 1e9
	var delays []time.Duration
	var lost, arrived float64
	for i, f := range flows {
		if f.received.Load() == 0 {
			return nil, fmt.Errorf("stream %d of %d passed no packet", i+1, len(flows))
		}
		if !f.background {
			delays, lost, arrived = append(delays, f.delays...), lost+float64(f.lost), arrived+float64(f.timed)
		}
	}
	out.setDelays(delays)
	out[lostShare] = lost / max(1, lost+arrived)
	return out, nil
}

// receiver is a client with the flows to it, by sender.
type receiver struct {
	client *client
	flows  map[key.NodePublic]*flow
}

// connectFlows connects the senders and the receivers of all streams.
func connectFlows(ctx context.Context, s *server, path *path, streams []stream) ([]*flow, map[int]*receiver, error) {
	var flows []*flow
	receivers := make(map[int]*receiver)
	dialAt := func(far bool) (*client, error) {
		if far {
			return path.dial(ctx, s)
		}
		return dialBusy(ctx, s)
	}
	for _, st := range streams {
		r := receivers[st.receiver]
		if r == nil {
			c, err := dialAt(!st.farSender)
			if err != nil {
				return nil, nil, err
			}
			r = &receiver{c, make(map[key.NodePublic]*flow)}
			receivers[st.receiver] = r
		}
		from, err := dialAt(st.farSender)
		if err != nil {
			return nil, nil, err
		}
		f := &flow{stream: st, from: from, frame: appendFrame(nil, r.client.public, st.size)}
		r.flows[from.public] = f
		flows = append(flows, f)
	}
	return flows, receivers, nil
}

const systemCongestionFile = "/proc/sys/net/ipv4/tcp_congestion_control"

// systemCongestion returns the congestion control that this namespace uses by default.
func systemCongestion() string {
	b, err := os.ReadFile(systemCongestionFile)
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}

// useCongestion makes a congestion control the default of this thread's namespace,
// which derper and the clients use.
func useCongestion(name string) error {
	if systemCongestion() == name {
		return nil
	}
	if err := os.WriteFile(systemCongestionFile, []byte(name), 0); err != nil {
		return fmt.Errorf("using %s in a network namespace: %w", name, err)
	}
	return nil
}
