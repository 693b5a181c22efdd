package admit

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"
)

// crowd is a relay's list of clients.
type crowd struct {
	mu   sync.Mutex
	here map[key.NodePublic]netip.Addr
	gone []key.NodePublic
}

func (c *crowd) clients() Clients {
	return Clients{
		List: func() map[key.NodePublic]netip.Addr {
			c.mu.Lock()
			defer c.mu.Unlock()
			list := make(map[key.NodePublic]netip.Addr, len(c.here))
			for node, addr := range c.here {
				list[node] = addr
			}
			return list
		},
		Disconnect: func(node key.NodePublic) error {
			c.mu.Lock()
			defer c.mu.Unlock()
			delete(c.here, node)
			c.gone = append(c.gone, node)
			return nil
		},
	}
}

// Whoever is clearly refused is disconnected within the interval; a source that
// cannot tell disconnects nobody.
func TestRecheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		member, removed := key.NewNode().Public(), key.NewNode().Public()
		var mu sync.Mutex
		broken, gone := error(nil), false
		s := Source{Name: "a", Ask: func(_ context.Context, node key.NodePublic, addr netip.Addr) (time.Time, error) {
			mu.Lock()
			defer mu.Unlock()
			switch {
			case broken != nil:
				return time.Time{}, broken
			case node == member || node == removed && !gone:
				if want := netip.MustParseAddr("192.0.2.1"); addr != want {
					t.Errorf("asked with address %s, want %s", addr, want)
				}
				return time.Now(), nil
			}
			return time.Now(), ErrRefused
		}}
		set := func(err error, isGone bool) {
			mu.Lock()
			defer mu.Unlock()
			broken, gone = err, isGone
		}
		addr := netip.MustParseAddr("192.0.2.1")
		c := &crowd{here: map[key.NodePublic]netip.Addr{member: addr, removed: addr}}
		g := NewGate(Config{Sources: []Source{s}, Grace: time.Hour, Interval: time.Minute, Path: t.TempDir() + "/admitted.json", Log: zerolog.Nop()})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx, c.clients()) }()
		synctest.Wait()

		set(errBroken, true)
		<-time.After(5 * time.Minute)
		if len(c.gone) > 0 {
			t.Errorf("%v were disconnected while the source was down", c.gone)
		}
		set(nil, true)
		<-time.After(time.Minute)
		synctest.Wait()
		if !slices.Equal(c.gone, []key.NodePublic{removed}) {
			t.Errorf("%v were disconnected, want only the node that was removed", c.gone)
		}
		if got := g.Counts().Disconnected; got != 1 {
			t.Errorf("counted %d, want 1", got)
		}
		set(errBroken, true)
		if err := g.Admit(t.Context(), removed, addr); err == nil {
			t.Error("the node came back by the grace")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A list that changed acts at once, whatever the interval.
func TestRecheckAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s switched
		s.set(nil)
		list := s.source()
		list.Local = true
		changes := make(chan struct{})
		list.Run = func(ctx context.Context, changed func()) error {
			for {
				select {
				case <-changes:
					changed()
				case <-ctx.Done():
					return nil
				}
			}
		}
		node := key.NewNode().Public()
		c := &crowd{here: map[key.NodePublic]netip.Addr{node: {}}}
		g := NewGate(Config{Sources: []Source{list}, Path: t.TempDir() + "/admitted.json", Log: zerolog.Nop()})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx, c.clients()) }()
		synctest.Wait()
		s.set(ErrRefused)
		changes <- struct{}{}
		synctest.Wait()
		if len(c.gone) != 1 {
			t.Error("the node is still connected")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// Refused clients are told of together.
func TestSummary(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		g := NewGate(Config{Sources: []Source{source("a", ErrRefused)}, Path: t.TempDir() + "/admitted.json", Log: zerolog.New(&log)})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx, (&crowd{}).clients()) }()
		for range 3 {
			node := key.NewNode().Public()
			for range 100 {
				_ = g.Admit(t.Context(), node, netip.Addr{})
			}
		}
		<-time.After(3 * summaryEvery)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), `"nodes":3,"refused":300`) {
			t.Errorf("want one line about 3 nodes and 300 refusals, got:\n%s", log.String())
		}
	})
}

func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkRecheck is one question about 5,000 connected nodes to a list of
// 10,000 keys, in CPU time of the whole process.
func BenchmarkRecheck(b *testing.B) {
	keys := make(KeySet)
	here := make(map[key.NodePublic]netip.Addr)
	for range 10_000 {
		node := key.NewNode().Public()
		keys[node] = struct{}{}
		if len(here) < 5_000 {
			here[node] = netip.Addr{}
		}
	}
	c := &crowd{here: here}
	g := NewGate(Config{Sources: []Source{Keys(keys)}, Grace: time.Hour, Path: b.TempDir() + "/admitted.json", Log: zerolog.Nop()})
	clients := c.clients()
	before := cpuTime(b)
	for b.Loop() {
		g.Recheck(b.Context(), clients)
	}
	b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N)/1e6, "cpu-ms/recheck")
	if len(c.gone) > 0 {
		b.Error(errors.New(fmt.Sprint(len(c.gone), " listed nodes were disconnected")))
	}
}
