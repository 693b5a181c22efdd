//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"tailscale.com/derp"
	"tailscale.com/net/stun"
	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

// The transaction that is read from an answer without parsing it is that of the
// request.
func TestAnswer(t *testing.T) {
	id := stun.NewTxID()
	answer := stun.Response(id, netip.MustParseAddrPort("192.0.2.1:1234"))
	if got, err := answerTo(answer); err != nil || got != id {
		t.Errorf("%x, %v; want %x", got, err, id)
	}
	for _, b := range [][]byte{nil, answer[:19], stun.Request(id)} {
		if _, err := answerTo(b); err == nil {
			t.Errorf("%x is accepted as an answer", b)
		}
	}
}

// An asker sends one request of each client, from another address each, and counts
// each answer to the burst under way once.
func TestAsker(t *testing.T) {
	server, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Close() }()
	if err := server.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort(server.LocalAddr().String())
	const clients = 16
	a, err := newAsker(at, clients)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()

	type request struct {
		id   stun.TxID
		from netip.AddrPort
	}
	burst := func() []request {
		t.Helper()
		if err := a.ask(); err != nil {
			t.Fatal(err)
		}
		var got []request
		for range clients {
			b := make([]byte, maxAnswer)
			n, from, err := server.ReadFromUDPAddrPort(b)
			if err != nil {
				t.Fatal(err)
			}
			id, err := stun.ParseBindingRequest(b[:n])
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, request{id, from})
		}
		return got
	}
	answer := func(r request) {
		t.Helper()
		if _, err := server.WriteToUDPAddrPort(stun.Response(r.id, r.from), r.from); err != nil {
			t.Fatal(err)
		}
		if err := a.take(true); err != nil {
			t.Fatal(err)
		}
	}

	if err := a.take(false); err != nil {
		t.Errorf("take without an answer: %v", err)
	}
	seen := map[stun.TxID]bool{}
	var late request
	for range keptRequests / clients {
		addresses := map[netip.Addr]bool{}
		requests := burst()
		for _, r := range requests {
			if addresses[r.from.Addr()] || seen[r.id] {
				t.Fatalf("client or request twice: %v", r)
			}
			addresses[r.from.Addr()], seen[r.id] = true, true
		}
		late = requests[0]
	}
	requests := burst() // the first ones again
	answer(late)
	if a.missing != clients {
		t.Errorf("%d answers are missing after one to another burst, want %d", a.missing, clients)
	}
	for i, r := range requests {
		if !seen[r.id] {
			t.Errorf("request %d is new", i)
		}
		answer(r)
		answer(r)
		if a.missing != clients-1-i {
			t.Fatalf("%d answers are missing after %d, want %d", a.missing, i+1, clients-1-i)
		}
	}

	var count tally
	count.timed.Store(true)
	count.count(a)
	answer(burst()[0])
	if a.missing != clients-1 {
		t.Errorf("%d answers are missing after the first one to a new burst, want %d", a.missing, clients-1)
	}
	if count.answers.Load() != clients || count.lost.Load() != 0 || len(count.delays) != 0 {
		t.Errorf("%d answers, %d lost, delays %v; want %d and nothing", count.answers.Load(), count.lost.Load(), count.delays, clients)
	}
}

func TestTally(t *testing.T) {
	single := &asker{asked: make([]stun.TxID, 1), at: time.Now().Add(-answerWithin / 2)}
	var c tally
	c.count(single)
	c.timed.Store(true)
	c.count(single)
	if c.answers.Load() != 2 || len(c.delays) != 1 || c.delays[0] < answerWithin/2 {
		t.Errorf("%d answers, delays %v; want 2, and one delay of half a second", c.answers.Load(), c.delays)
	}
	burst := &asker{asked: make([]stun.TxID, 4), missing: 3, at: time.Now()}
	c.count(burst)
	if burst.missing != 3 || c.lost.Load() != 0 {
		t.Errorf("%d missing, %d lost in time; want 3 and 0", burst.missing, c.lost.Load())
	}
	burst.at = burst.at.Add(-2 * answerWithin)
	c.count(burst)
	if burst.missing != 0 || c.lost.Load() != 3 || c.answers.Load() != 2 {
		t.Errorf("%d missing, %d lost, %d answers after the timeout; want 0, 3 and 2", burst.missing, c.lost.Load(), c.answers.Load())
	}
}

// receive counts lost packets and delays, wakes the sender, and rejects packets out
// of order.
func TestReceive(t *testing.T) {
	const size = 64
	receiver, relay := net.Pipe()
	var timed atomic.Bool
	timed.Store(true)
	p := &pair{to: &client{conn: receiver, reader: bufio.NewReader(receiver)}, size: size, wake: make(chan struct{}, 1), timed: &timed}
	ended := make(chan error, 1)
	go func() { ended <- p.receive() }()
	sentAt := time.Since(epoch)
	send := func(kind derp.FrameType, number uint64) {
		t.Helper()
		frame := append([]byte{byte(kind)}, binary.BigEndian.AppendUint32(nil, keyLen+size)...)
		frame = append(frame, make([]byte, keyLen)...)
		frame = binary.BigEndian.AppendUint64(frame, number)
		frame = binary.BigEndian.AppendUint64(frame, uint64(sentAt))
		frame = append(frame, make([]byte, size-smallestSize)...)
		if _, err := relay.Write(frame); err != nil {
			t.Fatal(err)
		}
	}
	send(derp.FrameRecvPacket, 0)
	send(derp.FramePeerGone, 7) // not a packet
	send(derp.FrameRecvPacket, 1)
	send(derp.FrameRecvPacket, 5)
	send(derp.FrameRecvPacket, 4)
	_ = relay.Close()
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "packet 4 came after packet 5") {
		t.Errorf("receive ended with: %v", err)
	}
	if p.received.Load() != 3 || p.lost.Load() != 3 || p.arrived.Load() != 6 {
		t.Errorf("%d received, %d lost, %d arrived; want 3, 3 and 6", p.received.Load(), p.lost.Load(), p.arrived.Load())
	}
	if len(p.delays) != 3 || slices.Min(p.delays) <= 0 || slices.Max(p.delays) > time.Since(epoch)-sentAt {
		t.Errorf("delays %v", p.delays)
	}
	select {
	case <-p.wake:
	default:
		t.Error("the sender was not woken")
	}
}

// A sender never has more than the window under way.
func TestSaturate(t *testing.T) {
	near, relay := net.Pipe()
	held := &bufferedConn{Conn: near, writer: bufio.NewWriterSize(near, bigBuffer)}
	p := &pair{from: &client{conn: held, held: held}, size: smallestSize, wake: make(chan struct{}, 1)}
	for range largestBurst {
		p.frames = appendFrame(p.frames, key.NewNode().Public(), smallestSize)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- p.saturate(ctx, false) }()
	frame := make([]byte, headerLen+smallestSize)
	read := func(from, to uint64) {
		t.Helper()
		for number := from; number < to; number++ {
			if _, err := io.ReadFull(relay, frame); err != nil {
				t.Fatal(err)
			}
			if got := binary.BigEndian.Uint64(frame[headerLen:]); got != number {
				t.Fatalf("packet %d, want %d", got, number)
			}
		}
	}
	nothing := func() {
		t.Helper()
		if err := relay.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if n, err := relay.Read(frame); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("%d bytes beyond the window, %v", n, err)
		}
		if err := relay.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
	}
	read(0, window)
	nothing()
	p.arrived.Store(largestBurst - 1)
	p.wake <- struct{}{}
	nothing()
	p.arrived.Store(largestBurst)
	p.wake <- struct{}{}
	read(window, window+largestBurst)
	nothing()
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestSource(t *testing.T) {
	for i, want := range map[int]string{0: "127.1.0.1", 99: "127.1.0.1", 100: "127.1.0.2", 24999: "127.1.0.250", 25000: "127.1.1.1", 250*250*100 - 1: "127.1.249.250"} {
		if got := source(i).String(); got != want {
			t.Errorf("connection %d comes from %s, want %s", i, got, want)
		}
	}
}

// Both servers are really measured, for a short time: the values are only checked
// for existence.
func TestMeasure(t *testing.T) {
	path := os.Getenv("DERPD_DERPER")
	if path == "" {
		t.Skip("DERPD_DERPER is not set to upstream's derper; run make test")
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("DERPD_DERPER: %v", err)
	}
	ctx := t.Context()
	dir := t.TempDir()
	built := filepath.Join(dir, "derpd-built")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", built, "derpd/cmd/derpd").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	certificate, err := testrelay.MakeCertificate(dir)
	if err != nil {
		t.Fatal(err)
	}
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		t.Fatal(err)
	}
	first := members(allowed)[:1]
	programs := []*program{
		{Name: testrelay.Derper, Path: path, Describe: testrelay.DerperCommand, Dir: dir, Certificate: certificate, CPUs: first},
		{Name: testrelay.Derpd, Path: built, Describe: testrelay.DerpdCommand, Dir: dir, Certificate: certificate, CPUs: first},
	}

	const moment = 500 * time.Millisecond // long enough on any machine
	const clients = 200
	var list []measurement
	expect := map[string][]metric{}
	add := func(name string, run func(context.Context, *server) (sample, error), metrics ...metric) {
		list = append(list, measurement{name: name, run: run})
		expect[name] = metrics
	}
	for _, l := range []load{
		{size: 1280, pairs: 2, burst: 8, time: moment},
		{size: 64, pairs: 2, burst: 1, time: moment, alone: true},
	} {
		add(l.name(), func(ctx context.Context, s *server) (sample, error) { return measureRelay(ctx, s, l) },
			packetRate, cpuPerPacket, cpuPerByte, callsPer, serverBusy, loadBusy)
	}
	slow := load{size: 8192, pairs: 3, burst: 2, rate: 200, time: moment}
	add(slow.name(), func(ctx context.Context, s *server) (sample, error) { return measureRelay(ctx, s, slow) },
		cpuPerPacket, delayMedian, delayP99)
	add(connectName, newConnects(4*moment).measure, connectRate, cpuPerConnect)
	for _, burst := range []int{1, stunBurst} {
		add(stunName(burst), func(ctx context.Context, s *server) (sample, error) { return measureSTUN(ctx, s, burst, moment) },
			answerRate, answersPer)
	}
	add(idleName(clients), func(ctx context.Context, s *server) (sample, error) {
		return measureIdle(ctx, s.Program, clients, moment)
	}, memoryPerClient, memoryAlone)
	add(startName, func(ctx context.Context, s *server) (sample, error) { return measureStart(ctx, s.Program, 1) },
		startDERP, startSTUN)
	var calls float64
	list = append(list, measurement{name: "twice", again: true, run: func(context.Context, *server) (sample, error) {
		calls++
		return sample{packetRate: calls}, nil
	}})
	add("where it runs", func(_ context.Context, s *server) (sample, error) {
		var set unix.CPUSet
		err := unix.SchedGetaffinity(s.PID, &set)
		if got := members(set); !slices.Equal(got, first) {
			t.Errorf("%s runs on CPUs %v, want %v", s.Name, got, first)
		}
		return nil, err
	})

	r := &report{Rounds: 1}
	if err := measureRound(ctx, list, programs, 1, r, io.Discard); err != nil {
		t.Fatal(err)
	}
	r.conclude()
	// derpd is first in round 1, so derper has calls 2 and 3, and derpd 1 and 4.
	if found := r.find("twice", packetRate); found == nil || found.Derper[0] != 2.5 || found.Derpd[0] != 2.5 || calls != 4 {
		t.Errorf("measured twice: %+v after %v calls, want means of 2.5", found, calls)
	}
	// The CPU time of one unit times the rate is the server's share of its CPU.
	value := func(name string, m metric) float64 {
		if found := r.find(name, m); found != nil && len(found.Derpd) > 0 {
			return found.Derpd[0]
		}
		return math.NaN()
	}
	large, single := list[0].name, list[1].name
	for _, c := range []struct {
		name string
		busy float64
	}{
		{large, value(large, packetRate) * value(large, cpuPerPacket) / 1e6},
		{large, value(large, packetRate) * 1280 * value(large, cpuPerByte) / 1e9},
		{single, value(single, packetRate) * value(single, cpuPerPacket) / 1e6},
		{connectName, value(connectName, connectRate) * value(connectName, cpuPerConnect) / 1e3},
		{stunName(1), value(stunName(1), answerRate) / value(stunName(1), answersPer)},
	} {
		if want := value(c.name, serverBusy); !(math.Abs(c.busy/want-1) < 1e-6) {
			t.Errorf("%s: rate and CPU time make %v of a CPU, want %v", c.name, c.busy, want)
		}
	}
	// Idle clients add less memory than the server itself has.
	if added := value(idleName(clients), memoryPerClient) * clients / 1024; !(added < value(idleName(clients), memoryAlone)) {
		t.Errorf("%d clients add %v MiB", clients, added)
	}
	for name, metrics := range expect {
		for _, m := range metrics {
			found := r.find(name, m)
			if found == nil || len(found.Derper) != r.Rounds || len(found.Derpd) != r.Rounds {
				t.Errorf("%s, %s: %+v", name, m, found)
				continue
			}
			if least := min(slices.Min(found.Derper), slices.Min(found.Derpd)); least <= 0 {
				t.Errorf("%s, %s: %v", name, m, least)
			}
		}
		// UDP datagrams may be lost, packets of a relay may not.
		if lost := r.find(name, lostPackets); lost != nil && strings.HasPrefix(name, "relay") && slices.Max(append(lost.Derper, lost.Derpd...)) > 0 {
			t.Errorf("%s: packets were lost: %+v", name, lost)
		}
	}
}
