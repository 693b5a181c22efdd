//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"tailscale.com/derp"
	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

func init() {
	register(row{
		name: "rates", short: true, timed: true, light: true, run: rates,
		attack: "a node sends all it can, on 1 and on 10 connections, while its limit changes",
	})
}

const (
	askedRate    = 20e6 // bits per second, 20Mbit
	changedRate  = 5e6
	rateWithin   = 0.05
	rateSize     = 1000 // bytes of a packet
	rateSettles  = 2 * time.Second
	changeWithin = time.Second
)

// rates measures what a relay takes from a node that is limited.
func rates(ctx context.Context, l *lab) ([]measured, error) {
	sender, other := key.NewNode(), key.NewNode()
	file := filepath.Join(l.Dir, "limits")
	limit := func(rate float64) error {
		line := fmt.Sprintf("%s rate=%.0fMbit\n", sender.Public(), rate/1e6)
		return os.WriteFile(file, []byte(line), 0o600)
	}
	if err := limit(askedRate); err != nil {
		return nil, err
	}
	r, err := l.start(ctx, setup{env: []string{"DERP_CLIENT_RATE=20Mbit", "DERP_LIMITS_FILE=" + file}})
	if err != nil {
		return nil, err
	}
	long := pick(l, 8*time.Second, 6*time.Second)
	var lines []measured
	limited := float64(askedRate)
	check := func(f *flood, what string, wanted float64, after time.Duration) error {
		l.say("%s", what)
		own, err := l.measureMachine(ctx)
		if err != nil {
			return err
		}
		if err := testrelay.Wait(ctx, after); err != nil {
			return err
		}
		before, lost, begun := f.taken.Load(), f.lost.Load(), time.Now()
		if err := testrelay.Wait(ctx, long); err != nil {
			return err
		}
		took := time.Since(begun)
		rate := float64(f.taken.Load()-before) * 8 / took.Seconds()
		lines = append(lines, judgeRate(what, rate, wanted, limited, took, own.stop(), f.lost.Load()-lost))
		limited = wanted
		return nil
	}
	for _, connections := range []int{1, 10} {
		// A key of its own, which only DERP_CLIENT_RATE limits, and then one of the file.
		private := other
		if connections == 10 {
			private = sender
		}
		f, err := l.flood(ctx, r, private, connections)
		if err != nil {
			return nil, err
		}
		if err := check(f, fmt.Sprintf("%d connections of a key", connections), askedRate, rateSettles); err != nil {
			return nil, err
		}
		if connections == 10 {
			for _, rate := range []float64{changedRate, askedRate} {
				if err := limit(rate); err != nil {
					return nil, err
				}
				if err := check(f, fmt.Sprintf("%v after DERP_LIMITS_FILE says %.0fMbit", changeWithin, rate/1e6), rate, changeWithin); err != nil {
					return nil, err
				}
			}
		}
		f.stop()
	}
	return lines, nil
}

// judgeRate returns the line of a rate that was measured over a time. At the ends of that
// time, a busy machine moves bytes in or out of it, at the rate of then or of before. What
// a few of the machine's delays move is no proof.
func judgeRate(what string, rate, wanted, before float64, over, machine time.Duration, lost int64) measured {
	off := math.Abs(rate - wanted)
	line := promise(fmt.Sprintf("%s: %.0f Mbit/s within %.0f %%", what, wanted/1e6, rateWithin*100), off <= rateWithin*wanted,
		"%.2f Mbit/s, %d packets lost, machine %s", rate/1e6, lost, millis(machine))
	moved := max(wanted, before) * slowerBy * machine.Seconds() / over.Seconds()
	if line.State == broken && off <= rateWithin*wanted+moved {
		line.State = notReached
	}
	return line
}

// flood is a node that sends all it can. Each of its connections has a receiver, so that
// the queue of no receiver is the limit.
type flood struct {
	taken   atomic.Int64 // bytes of frames that the relay has read, lost ones included
	lost    atomic.Int64 // packets that a receiver's queue had no room for
	clients []*testrelay.Client
}

func (l *lab) flood(ctx context.Context, r *relay, private key.NodePrivate, connections int) (*flood, error) {
	f := &flood{}
	l.onClose(f.stop)
	for range connections {
		to, err := testrelay.Dial(ctx, r.Target(), key.NewNode(), netip.Addr{})
		if err != nil {
			return nil, err
		}
		f.clients = append(f.clients, to)
		from, err := testrelay.Dial(ctx, r.Target(), private, netip.Addr{})
		if err != nil {
			return nil, err
		}
		f.clients = append(f.clients, from)
		go f.receive(to)
		go send(from, to.Public)
	}
	return f, nil
}

// send sends numbered packets until the connection ends.
func send(from *testrelay.Client, to key.NodePublic) {
	frame := sendFrame(to, make([]byte, rateSize))
	for number := uint64(0); ; number++ {
		binary.BigEndian.PutUint64(frame[len(frame)-rateSize:], number)
		if _, err := from.Conn.Write(frame); err != nil {
			return
		}
	}
}

// receive counts frames until the connection ends.
func (f *flood) receive(to *testrelay.Client) {
	next := uint64(0)
	for {
		kind, length, err := derp.ReadFrameHeader(to.Reader)
		if err == nil && kind == derp.FrameRecvPacket {
			var b []byte
			if b, err = to.Reader.Peek(keyLen + 8); err == nil {
				number := binary.BigEndian.Uint64(b[keyLen:])
				f.lost.Add(int64(number - next))
				f.taken.Add(int64(number-next+1) * int64(derp.FrameHeaderLen+length))
				next = number + 1
			}
		}
		if err == nil {
			_, err = to.Reader.Discard(int(length))
		}
		if err != nil {
			return
		}
	}
}

func (f *flood) stop() {
	for _, c := range f.clients {
		_ = c.Conn.NetConn().Close()
	}
}
