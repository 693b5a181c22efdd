//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"derpd/internal/testrelay"
)

func init() {
	register(row{
		name: "slow", attack: "40 clients that read 512 bytes each 300 ms, and 10 that read nothing, while others send 64 KiB packets to them",
		short: true, upstream: true, light: true, run: runSlow,
	})
}

const (
	slowReaders    = 40
	stoppedReaders = 10
	slowHolds      = 256 << 10 // bytes of memory for each
	goneWithin     = 30 * time.Second
)

func runSlow(ctx context.Context, l *lab) ([]measured, error) {
	r, err := l.start(ctx, setup{})
	if err != nil {
		return nil, err
	}
	fast, span := pick(l, 8*time.Second, 3*time.Second), pick(l, 30*time.Second, 10*time.Second)
	a, err := l.attack(ctx, r, load{
		Kind: "slow", AtOnce: slowReaders, Stopped: stoppedReaders, Addresses: 1000, Rate: 400, Hold: fast,
		For: fast + span + goneWithin + 30*time.Second,
	})
	if err != nil {
		return nil, err
	}
	const all = slowSenders + slowReaders + stoppedReaders
	if err := a.until(ctx, "connected", all); err != nil {
		return nil, err
	}
	watch := r.watchMemory(ctx)
	if err := a.until(ctx, "slow", slowReaders+stoppedReaders); err != nil {
		return nil, err
	}
	usual := watch()
	l.say("all have read: %d MB", usual>>20)
	begun, gone := time.Now(), time.Duration(0)
	watch = r.watchMemory(ctx)
	for gone == 0 || time.Since(begun) < span {
		open, err := established(r.HTTPS, slowSenders+slowReaders, stoppedReaders)
		if err != nil {
			return nil, err
		}
		if open == 0 && gone == 0 {
			gone = time.Since(begun)
			l.say("those that read nothing are gone")
		}
		if gone == 0 && time.Since(begun) > goneWithin+halfOpenGrace {
			gone = time.Since(begun)
		}
		if err := testrelay.Wait(ctx, memoryEvery); err != nil {
			return nil, err
		}
	}
	peak := watch()
	t, err := a.stop()
	if err != nil {
		return nil, err
	}
	if err := r.died(); err != nil {
		return nil, err
	}
	each := max(0, peak-usual) / (slowReaders + stoppedReaders)
	return []measured{
		promise(fmt.Sprintf("a slow reader holds at most %d KiB", slowHolds>>10), each <= slowHolds, "%d KiB, %s in all", each>>10, megabytes(peak-usual)),
		l.timely(promise(fmt.Sprintf("gone within %.0f s without progress", goneWithin.Seconds()), gone <= goneWithin, "%.1f s", gone.Seconds())),
		note("slow readers that were closed", "%d of %d", t.counts["closed"], slowReaders),
		strength("sent to them", float64(t.counts["bytes"]>>20), 100, " MB"),
	}, nil
}

// until waits until a counter of the attacker has a value.
func (a *assault) until(ctx context.Context, name string, value int64) error {
	for a.count(name) < value {
		select {
		case <-a.done:
			_, err := a.wait(ctx)
			return errors.Join(err, fmt.Errorf("the attacker ended with %d of %d %s", a.count(name), value, name))
		default:
		}
		if err := testrelay.Wait(ctx, printEvery); err != nil {
			return err
		}
	}
	return nil
}

// established returns how many of count attackers' addresses have an established
// connection at the server's end. A server may have closed a connection that its client
// cannot see closed: unread data is before the end.
func established(server netip.AddrPort, first, count int) (int, error) {
	wanted := map[netip.Addr]bool{}
	for i := range count {
		wanted[attackerAddr(first+i)] = true
	}
	text, err := os.ReadFile("/proc/self/net/tcp")
	if err != nil {
		return 0, err
	}
	return countEstablished(string(text), server, wanted), nil
}

// countEstablished reads /proc/net/tcp: number, local address, remote address, state
// and more (proc(5)).
func countEstablished(text string, local netip.AddrPort, remotes map[netip.Addr]bool) int {
	const established = "01"
	n := 0
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 4 || fields[3] != established {
			continue
		}
		at, err := parseHexAddr(fields[1])
		if err != nil || at != local {
			continue
		}
		if peer, err := parseHexAddr(fields[2]); err == nil && remotes[peer.Addr()] {
			n++
		}
	}
	return n
}

// parseHexAddr reads 0100007F:1F90, an address in the byte order of this machine.
func parseHexAddr(text string) (netip.AddrPort, error) {
	addr, port, _ := strings.Cut(text, ":")
	b, err := hex.DecodeString(addr)
	if err != nil || len(b) != 4 {
		return netip.AddrPort{}, fmt.Errorf("not an IPv4 address: %q", text)
	}
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, err
	}
	var ip [4]byte
	binary.NativeEndian.PutUint32(ip[:], binary.BigEndian.Uint32(b))
	return netip.AddrPortFrom(netip.AddrFrom4(ip), uint16(n)), nil
}
