//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"tailscale.com/derp"
	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

func init() {
	register(row{
		name: "soak", short: true, timed: true, upstream: true, light: true, run: soak,
		attack: "for the time of --soak, members come and go, packets flow, and strangers knock",
	})
}

const (
	usualSoak    = 3 * time.Minute
	shortSoak    = 20 * time.Second
	comers       = 20  // members under way at once
	comerKeys    = 200 // of nodes, which come back
	longestStay  = 2 * time.Second
	soakAskers   = 5
	sampleEvery  = time.Second
	soakSays     = 15 * time.Second
	mostGrowth   = 2 << 20 // bytes, during the samples that count
	shortGrowth  = 8 << 20 // the same for a short soak, in which memory still fills
	heldInStalls = 3       // times as much memory holds what waits while the machine stalls
	strayFiles   = 3       // descriptors that may be open for another reason than before
	closedWithin = 30 * time.Second
)

// soak measures how memory and descriptors grow after a third of the time.
func soak(ctx context.Context, l *lab) ([]measured, error) {
	s, err := l.newSource(ctx, 0)
	if err != nil {
		return nil, err
	}
	r, err := l.start(ctx, setup{source: s, env: []string{"DERP_VERIFY_INTERVAL=5s"}})
	if err != nil {
		return nil, err
	}
	idle, err := descriptors(r.PID)
	if err != nil {
		return nil, err
	}
	m, err := l.members(ctx, r, s, memberCount)
	if err != nil {
		return nil, err
	}
	c := l.comeAndGo(ctx, r, s, m)
	strangers, err := l.attack(ctx, r, load{Kind: "strangers", AtOnce: soakAskers, Addresses: soakAskers})
	if err != nil {
		return nil, err
	}
	l.say("%v with %d members, %d that come and go, and %d strangers", l.Soak, memberCount, comers, soakAskers)
	m.begin()
	var memory, files []sampled
	var said time.Duration
	err = sample(ctx, l.Soak, func(at time.Duration) error {
		bytes, err := testrelay.ResidentBytes(r.PID)
		if err != nil {
			return err
		}
		open, err := descriptors(r.PID)
		if err != nil {
			return err
		}
		if at >= said {
			l.say("%d KiB, %d descriptors", bytes>>10, open)
			said += soakSays
		}
		if at > l.Soak/3 {
			memory = append(memory, sampled{at, float64(bytes)})
			files = append(files, sampled{at, float64(open)})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	seen, err := m.end(ctx)
	if err != nil {
		return nil, err
	}
	t, err := strangers.stop()
	if err != nil {
		return nil, err
	}
	c.stop()
	m.close()
	s.stop() // and with it the connections that the relay keeps for questions
	left, err := awaitDescriptors(ctx, r.PID, idle+strayFiles)
	if err != nil {
		return nil, err
	}
	grown := slope(memory) * (l.Soak * 2 / 3).Minutes()
	limit := pick(l, int64(mostGrowth), shortGrowth)
	flat := promise(fmt.Sprintf("memory grows by less than %s", megabytes(limit)), grown < float64(limit),
		"%s in %v: %+.0f KiB/min", megabytes(int64(grown)), (l.Soak * 2 / 3).Round(time.Second), slope(memory)/(1<<10))
	if grown < heldInStalls*float64(limit) {
		flat = l.timely(flat)
	}
	return []measured{
		strength("members that came and went", float64(c.came.Load()), l.Soak.Seconds()*comers/4, ""),
		flat,
		note("descriptors during the soak", "%+.1f/min", slope(files)),
		promise("descriptors are as before when all have gone", left <= idle+strayFiles, "%d before, %d after", idle, left),
		l.timely(promise("no member is disconnected", seen.Disconnected == 0, "%s, p99 %s", seen.loss(), millis(seen.P99))),
		promise("no stranger is admitted", t.counts["admitted"] == 0, "%d of %d", t.counts["admitted"], t.tried()),
	}, nil
}

// sample calls take now and then, for a time.
func sample(ctx context.Context, long time.Duration, take func(at time.Duration) error) error {
	ctx, cancel := context.WithTimeout(ctx, long)
	defer cancel()
	begun := time.Now()
	var failed error
	pace(ctx, 0, sampleEvery, func(time.Time) error {
		failed = take(time.Since(begun))
		return failed
	})
	return failed
}

// descriptors returns how many descriptors a process has open.
func descriptors(pid int) (int, error) {
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(list), err
}

// awaitDescriptors waits until a process has at most so many descriptors, and returns how
// many it has.
func awaitDescriptors(ctx context.Context, pid, most int) (int, error) {
	for deadline := time.Now().Add(closedWithin); ; {
		open, err := descriptors(pid)
		if err != nil || open <= most || time.Now().After(deadline) {
			return open, err
		}
		if err := testrelay.Wait(ctx, tryAgain); err != nil {
			return open, err
		}
	}
}

// coming are members that come and go.
type coming struct {
	came   atomic.Int64
	cancel context.CancelFunc
	done   sync.WaitGroup
}

// comeAndGo lets members connect, send a packet to another member, and leave.
func (l *lab) comeAndGo(ctx context.Context, r *relay, s *source, m *members) *coming {
	c := &coming{}
	ctx, c.cancel = context.WithCancel(ctx)
	keys := make([]key.NodePrivate, comerKeys)
	for i := range keys {
		keys[i] = key.NewNode()
		s.admit(true, keys[i].Public())
	}
	for i := range comers {
		c.done.Go(func() {
			for ctx.Err() == nil {
				client, err := testrelay.Dial(ctx, r.Target(), keys[rand.IntN(len(keys))], memberAddr(memberCount+i))
				if err != nil {
					_ = testrelay.Wait(ctx, tryAgain)
					continue
				}
				c.came.Add(1)
				_, _ = client.Conn.Write(sendFrame(m.clients[rand.IntN(len(m.clients))].Public, make([]byte, 2*memberSize)))
				_ = testrelay.Wait(ctx, rand.N(longestStay))
				client.Close()
			}
		})
	}
	l.onClose(c.stop)
	return c
}

func (c *coming) stop() {
	c.cancel()
	c.done.Wait()
}

// sendFrame returns a frame that sends a packet.
func sendFrame(to key.NodePublic, packet []byte) []byte {
	frame := []byte{byte(derp.FrameSendPacket)}
	frame = binary.BigEndian.AppendUint32(frame, uint32(keyLen+len(packet)))
	return append(to.AppendTo(frame), packet...)
}
