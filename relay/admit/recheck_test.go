package admit

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"go4.org/mem"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// switched is a source whose answer can be changed.
type switched struct{ answer atomic.Pointer[error] }

func (s *switched) set(err error) { s.answer.Store(&err) }

func (s *switched) source() Source {
	return Source{Name: "switched", Ask: func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) {
		return time.Now(), *s.answer.Load()
	}}
}

// crowd is the list of clients of a relay.
type crowd struct {
	mu   sync.Mutex
	here map[key.NodePublic]netip.Addr
	gone []key.NodePublic
	err  error // of Disconnect
}

func (c *crowd) clients() Clients {
	return Clients{
		List: func() map[key.NodePublic]netip.Addr {
			c.mu.Lock()
			defer c.mu.Unlock()
			return maps.Clone(c.here)
		},
		Disconnect: func(node key.NodePublic) error {
			c.mu.Lock()
			defer c.mu.Unlock()
			delete(c.here, node)
			c.gone = append(c.gone, node)
			return c.err
		},
	}
}

// A node that every source refuses is disconnected within the interval. A
// source that is unavailable disconnects no node.
func TestRecheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		member, removed := newNode(), newNode()
		addr := netip.MustParseAddr("192.0.2.1")
		var mu sync.Mutex
		broken, gone := error(nil), false
		s := Source{Name: "a", Ask: func(_ context.Context, node key.NodePublic, from netip.Addr) (time.Time, error) {
			mu.Lock()
			defer mu.Unlock()
			switch {
			case broken != nil:
				return time.Time{}, broken
			case node == member || node == removed && !gone:
				if from != addr {
					t.Errorf("asked with address %s, want %s", from, addr)
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
		var log strings.Builder
		c := &crowd{here: map[key.NodePublic]netip.Addr{member: addr, removed: addr}}
		g := NewGate(Config{Sources: []Source{s}, Grace: time.Hour, Interval: time.Minute, Path: t.TempDir() + "/admitted.json", Log: zerolog.New(&log)})
		stop := run(t, g, c.clients())
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
		if got := g.Counts(); got != (Counts{Disconnected: 1}) {
			t.Errorf("counted %+v, want only one disconnected", got)
		}
		if want := `"level":"info","node":"` + removed.ShortString() + `","message":"node disconnected: no source admits it any longer"`; strings.Count(log.String(), want) != 1 {
			t.Errorf("want %s in\n%s", want, &log)
		}
		set(errBroken, true)
		if err := g.Admit(t.Context(), removed, addr); err == nil {
			t.Error("the node came back by the grace")
		}
		if err := g.Admit(t.Context(), member, addr); err != nil {
			t.Errorf("a recheck does not extend the grace: %v", err)
		}
		stop()
	})
}

// Health shows an unavailable source before the first client connects, and
// while none does.
func TestSourcesAreAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s switched
		s.set(errBroken)
		g := NewGate(Config{Sources: []Source{s.source()}, Interval: time.Minute, Path: t.TempDir() + "/admitted.json", Log: zerolog.Nop()})
		stop := run(t, g, (&crowd{}).clients())
		synctest.Wait()
		if err := g.States()[0].Err; !errors.Is(err, errBroken) {
			t.Errorf("at the start: %v", err)
		}
		s.set(ErrRefused)
		<-time.After(time.Minute)
		synctest.Wait()
		if s := g.States()[0]; s.Err != nil || time.Since(s.AsOf) != 0 {
			t.Errorf("after a minute: %v as of %s", s.Err, s.AsOf)
		}
		stop()
	})
}

// A recheck asks no question about a node while every source is unavailable,
// and asks while one of several answers.
func TestRecheckNeedsASource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := newNode()
		var asked atomic.Int32
		down := Source{Name: "down", Ask: func(_ context.Context, about key.NodePublic, _ netip.Addr) (time.Time, error) {
			if about == node {
				asked.Add(1)
			}
			return time.Time{}, errBroken
		}}
		for _, tt := range []struct {
			sources []Source
			want    int32
		}{
			{[]Source{down}, 0},
			{[]Source{down, source("refuses", ErrRefused)}, 1},
			{[]Source{down, source("admits", nil)}, 1},
		} {
			asked.Store(0)
			c := &crowd{here: map[key.NodePublic]netip.Addr{node: {}}}
			stop := run(t, newGate(t, tt.sources...), c.clients())
			synctest.Wait()
			if got := asked.Load(); got != tt.want || len(c.gone) > 0 {
				t.Errorf("%d sources: asked %d times, want %d; %d disconnected", len(tt.sources), got, tt.want, len(c.gone))
			}
			stop()
		}
	})
}

// A recheck asks at most 16 questions at the same time, and all of them.
func TestRecheckAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var running, most, all atomic.Int32
		slow := Source{Name: "slow", Ask: func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) {
			most.Store(max(most.Load(), running.Add(1)))
			all.Add(1)
			<-time.After(time.Second)
			running.Add(-1)
			return time.Now(), ErrRefused
		}}
		c := &crowd{here: make(map[key.NodePublic]netip.Addr)}
		for range 40 {
			c.here[newNode()] = netip.Addr{}
		}
		g := newGate(t, slow)
		began := time.Now()
		g.Recheck(t.Context(), c.clients())
		if most.Load() != 16 || all.Load() != 40 || time.Since(began) != 3*time.Second || len(c.gone) != 40 {
			t.Errorf("%d questions, %d at the same time, in %s, %d disconnected; want 40, 16, 3s, 40", all.Load(), most.Load(), time.Since(began), len(c.gone))
		}
		// Lists answer at once, without a goroutine for each node.
		slow.Local = true
		most.Store(0)
		for range 3 {
			c.here[newNode()] = netip.Addr{}
		}
		newGate(t, slow).Recheck(t.Context(), c.clients())
		if most.Load() != 1 {
			t.Errorf("%d questions to a list at the same time", most.Load())
		}
	})
}

// The end of the relay ends a recheck.
func TestRecheckEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		c := &crowd{here: map[key.NodePublic]netip.Addr{newNode(): {}, newNode(): {}, newNode(): {}}}
		asked := 0
		newGate(t, Source{Name: "list", Local: true, Ask: func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) {
			asked++
			cancel()
			return time.Now(), nil
		}}).Recheck(ctx, c.clients())
		if asked != 1 {
			t.Errorf("asked %d times, want once", asked)
		}
	})
}

// A node that could not be disconnected is logged, and not counted.
func TestNotDisconnected(t *testing.T) {
	var log strings.Builder
	node := newNode()
	c := &crowd{here: map[key.NodePublic]netip.Addr{node: {}}, err: errBroken}
	g := NewGate(Config{Sources: []Source{source("a", ErrRefused)}, Path: t.TempDir() + "/admitted.json", Log: zerolog.New(&log)})
	g.Recheck(t.Context(), c.clients())
	if got := g.Counts().Disconnected; got != 0 {
		t.Errorf("counted %d", got)
	}
	if want := `"level":"warn","error":"connection refused","node":"` + node.ShortString() + `"`; strings.Count(log.String(), "\n") != 1 || !strings.Contains(log.String(), want) {
		t.Errorf("want %s in\n%s", want, &log)
	}
}

// A list that changed acts immediately, whatever the interval.
func TestListChanged(t *testing.T) {
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
		c := &crowd{here: map[key.NodePublic]netip.Addr{newNode(): {}}}
		g := NewGate(Config{Sources: []Source{list}, Path: t.TempDir() + "/admitted.json", Log: zerolog.Nop()})
		stop := run(t, g, c.clients())
		synctest.Wait()
		s.set(ErrRefused)
		<-time.After(24 * time.Hour)
		if len(c.gone) > 0 {
			t.Error("a recheck without an interval and without a change")
		}
		changes <- struct{}{}
		synctest.Wait()
		if len(c.gone) != 1 {
			t.Error("the node is still connected")
		}
		stop()
	})
}

// A source that fails ends the gate with its error.
func TestSourceFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := source("a", nil)
		s.Run = func(context.Context, func()) error { return errBroken }
		if err := newGate(t, s).Run(t.Context(), (&crowd{}).clients()); !errors.Is(err, errBroken) {
			t.Error(err)
		}
	})
}

// Refused clients are logged together, every ten minutes.
func TestSummary(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		var s switched
		g := NewGate(Config{Sources: []Source{s.source()}, Path: t.TempDir() + "/admitted.json", Log: zerolog.New(&log).Level(zerolog.InfoLevel)})
		s.set(ErrRefused)
		stop := run(t, g, (&crowd{}).clients())
		ask := func(nodes, times int, answer error) {
			s.set(answer)
			for range nodes {
				node := newNode()
				for range times {
					_ = g.Admit(t.Context(), node, netip.Addr{})
				}
			}
		}
		want := func(when, line string) {
			t.Helper()
			<-time.After(10*time.Minute + time.Second)
			synctest.Wait()
			lines := strings.SplitAfter(log.String(), "\n")
			log.Reset()
			lines = slices.DeleteFunc(lines, func(l string) bool { return !strings.Contains(l, "clients refused") })
			if got := strings.Join(lines, ""); got != line {
				t.Errorf("%s: logged %swant %s", when, got, line)
			}
		}
		line := `{"level":"info","nodes":%d,"refused":%d,"source_unavailable":%d,"too_many_questions":%d,"within_ms":600000,"message":"clients refused"}` + "\n"
		ask(3, 100, ErrRefused)
		ask(5, 1, nil)
		want("at first", fmt.Sprintf(line, 3, 300, 0, 0))
		want("without a refusal", "")
		ask(1, 2, ErrRefused)
		ask(2, 3, errBroken)
		want("again", fmt.Sprintf(line, 3, 2, 6, 0))
		stop()
	})
}

// The gate keeps a limited number of refused keys, and none of admitted nodes.
func TestRefusedKeysAreLimited(t *testing.T) {
	g := newGate(t)
	for i := range 10_100 {
		g.count(key.NodePublicFromRaw32(mem.B(fmt.Appendf(nil, "%032d", i))), refused)
	}
	if n := g.takeRefusedKeys(); n != 10_000 {
		t.Errorf("%d keys kept, want 10,000", n)
	}
	if n := g.takeRefusedKeys(); n != 0 {
		t.Errorf("%d keys are left", n)
	}
	for d, want := range map[decision]int{admitted: 0, kept: 0, refused: 1, unavailable: 1} {
		g.count(newNode(), d)
		if n := g.takeRefusedKeys(); n != want {
			t.Errorf("decision %d: %d keys kept, want %d", d, n, want)
		}
	}
	if got := g.Counts(); got != (Counts{Admitted: 1, Kept: 1, Refused: 10_101, Unavailable: 1}) {
		t.Errorf("counted %+v", got)
	}
}

// BenchmarkRecheck is one question about 5,000 connected nodes to a list of
// 10,000 keys, in CPU time of the whole process.
func BenchmarkRecheck(b *testing.B) {
	keys := make(KeySet)
	here := make(map[key.NodePublic]netip.Addr)
	for range 10_000 {
		node := key.NewNode().Public()
		keys[node] = ""
		if len(here) < 5_000 {
			here[node] = netip.Addr{}
		}
	}
	c := &crowd{here: here}
	g := NewGate(Config{Sources: []Source{Keys(keys)}, Grace: time.Hour, Path: b.TempDir() + "/admitted.json", Log: zerolog.Nop()})
	clients := c.clients()
	before := testkit.CPUTime(b)
	for b.Loop() {
		g.Recheck(b.Context(), clients)
	}
	b.ReportMetric(float64(testkit.CPUTime(b)-before)/float64(b.N)/1e6, "cpu-ms/recheck")
	if len(c.gone) > 0 {
		b.Error(errors.New(fmt.Sprint(len(c.gone), " listed nodes were disconnected")))
	}
}
