package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tailscale.com/derp"
	"tailscale.com/types/key"
)

// limiting returns a set of sessions whose nodes have the limit that is stored.
func limiting(limit NodeLimit) (*sessions, *atomic.Pointer[NodeLimit]) {
	all, _ := holding(maxHeld)
	now := new(atomic.Pointer[NodeLimit])
	now.Store(&limit)
	all.of = func(key.NodePublic) NodeLimit { return *now.Load() }
	return all, now
}

// join adds a session of an admitted node. The client's end is returned too.
func join(t *testing.T, all *sessions, node key.NodePublic) (*session, net.Conn) {
	t.Helper()
	near, far := net.Pipe()
	t.Cleanup(func() { _ = far.Close() })
	s := newSession(all, near, nil, near.RemoteAddr())
	all.add(s)
	first := greetingOf(node, derp.FrameClientInfo)
	go func() { _, _ = far.Write(first) }()
	if _, err := io.ReadFull(s, make([]byte, len(first))); err != nil {
		t.Fatal(err)
	}
	s.admitted = true
	all.admitted(s)
	return s, far
}

// flood makes the client send until the connection ends.
func flood(far net.Conn) {
	go func() {
		for {
			if _, err := far.Write(make([]byte, 1400)); err != nil {
				return
			}
		}
	}()
}

// drain reads until the session ends, and adds the bytes to read.
func drain(s *session, size int, read *atomic.Int64) error {
	p := make([]byte, size)
	for {
		n, err := s.Read(p)
		read.Add(int64(n))
		if err != nil {
			return err
		}
	}
}

// A node sends its burst and then its rate, with one connection and with ten, whatever
// the size of the reads. Another node has a rate of its own.
func TestPace(t *testing.T) {
	for _, rate := range []int64{16 << 10, 1_000_000} {
		for _, connections := range []int{1, 10} {
			synctest.Test(t, func(t *testing.T) {
				limit := NodeLimit{Rate: rate, Burst: int(max(rate/4, 64<<10))}
				all, _ := limiting(limit)
				nodes := [2]key.NodePublic{key.NewNode().Public(), key.NewNode().Public()}
				var read [2]atomic.Int64
				var reading sync.WaitGroup
				for i, node := range nodes {
					for j := range connections {
						s, far := join(t, all, node)
						flood(far)
						reading.Go(func() { _ = drain(s, []int{512, 1024, 16 << 10, 64 << 10}[j%4], &read[i]) })
					}
				}
				const seconds = 3
				<-time.After(seconds * time.Second) // of the bubble's clock
				for i := range nodes {
					most := seconds*rate + int64(limit.Burst)
					least := most - int64(connections)*64<<10 // bytes that wait now
					if got := read[i].Load(); got > most || got < least {
						t.Errorf("%d bytes/s, %d connections: %d bytes in %d s, want %d to %d", rate, connections, got, seconds, least, most)
					}
				}
				all.end()
				reading.Wait()
			})
		}
	}
}

// A short burst is no longer than asked for, and reads longer than the burst pass.
func TestPaceShortBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all, _ := limiting(NodeLimit{Rate: 100_000, Burst: 1000})
		s, far := join(t, all, key.NewNode().Public())
		flood(far)
		var read atomic.Int64
		go func() { _ = drain(s, 64<<10, &read) }()
		<-time.After(10 * time.Second)
		if got := read.Load(); got > 1_001_000 || got < 998_000 {
			t.Errorf("%d bytes in 10 s, want 1,001,000 at most", got)
		}
		all.end()
	})
}

// waiting starts a session whose reader waits for hours, and returns its end.
func waiting(t *testing.T, all *sessions, node key.NodePublic) (s *session, far net.Conn, end chan error) {
	t.Helper()
	s, far = join(t, all, node)
	flood(far)
	end = make(chan error, 1)
	var read atomic.Int64
	go func() { end <- drain(s, 1024, &read) }()
	return s, far, end
}

// slowest lets a reader wait for minutes.
var slowest = NodeLimit{Rate: 1, Burst: 2000}

// A reader that waits ends at once with its connection, whoever ends it, and gives
// back what it waited for.
func TestPaceEnds(t *testing.T) {
	for name, tt := range map[string]struct {
		end  func(all *sessions, s *session)
		want error
	}{
		"Close":    {func(_ *sessions, s *session) { _ = s.Close() }, net.ErrClosed},
		"closeAll": {func(all *sessions, _ *session) { all.closeAll() }, net.ErrClosed},
		"a write fails": {func(_ *sessions, s *session) {
			_ = s.SetWriteDeadline(time.Now().Add(-time.Hour))
			_, _ = s.Write(frame(5))
		}, net.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				all, _ := limiting(slowest)
				s, _, end := waiting(t, all, key.NewNode().Public())
				<-time.After(3 * time.Second)
				pace, begun := s.paced.Load().pace, time.Now()
				before := pace.limiter.Tokens()
				tt.end(all, s)
				if err := <-end; !errors.Is(err, tt.want) {
					t.Errorf("the reader ended with %v, want %v", err, tt.want)
				}
				if took := time.Since(begun); took > 0 {
					t.Errorf("the reader ended after %s", took)
				}
				if after := pace.limiter.Tokens(); before > -300 || after < 0 {
					t.Errorf("%.0f tokens while the reader waits, %.0f afterwards", before, after)
				}
				all.end()
			})
		})
	}
}

// Another limit applies at once to a reader that waits, without another burst.
func TestPaceChanges(t *testing.T) {
	for name, tt := range map[string]struct {
		next NodeLimit
		want int64 // bytes in the next ten seconds
	}{
		"faster":        {NodeLimit{Rate: 100_000, Burst: 50_000}, 1_000_000},
		"still slow":    {NodeLimit{Rate: 200, Burst: 50_000}, 2000},
		"no limit":      {NodeLimit{}, 2_000_000},
		"another burst": {NodeLimit{Rate: 1, Burst: 5000}, 10},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				all, limit := limiting(slowest)
				s, far := join(t, all, key.NewNode().Public())
				go func() { _, _ = far.Write(make([]byte, 2_000_000)) }()
				var read atomic.Int64
				go func() { _ = drain(s, 1024, &read) }()
				<-time.After(3 * time.Second)
				limit.Store(&tt.next)
				before := read.Load()
				(&Relay{sessions: all}).ApplyNodeLimits()
				<-time.After(10 * time.Second)
				if got := read.Load() - before; got > tt.want || got < tt.want-3000 {
					t.Errorf("%d bytes in 10 s, want %d", got, tt.want)
				}
				all.end()
			})
		})
	}
}

// kept returns the number of nodes, and of those without a connection.
func (all *sessions) kept() (nodes, parted int) {
	all.mu.Lock()
	defer all.mu.Unlock()
	return len(all.nodes), all.parted
}

// A node that connects again has the tokens that it left, and a node that has paused
// has a whole burst. Then nothing of the node is kept.
func TestPaceOfNextConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all, _ := limiting(NodeLimit{Rate: 1000, Burst: 10_000})
		r := &Relay{sessions: all}
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _ = r.RunNodeLimits(ctx) }()
		node := key.NewNode().Public()
		send := func() int64 {
			s, far := join(t, all, node)
			flood(far)
			var read atomic.Int64
			go func() { _ = drain(s, 1024, &read) }()
			synctest.Wait()
			_ = s.Close()
			synctest.Wait()
			return read.Load()
		}
		if got := send(); got < 8000 || got > 10_000 {
			t.Errorf("the first connection sends %d bytes, want a burst", got)
		}
		for range 5 {
			if got := send(); got > 2000 {
				t.Errorf("the next connection sends %d bytes at once", got)
			}
		}
		if nodes, parted := all.kept(); nodes != 1 || parted != 1 {
			t.Errorf("%d nodes are kept, %d of them parted", nodes, parted)
		}
		<-time.After(12 * time.Second)
		if nodes, parted := all.kept(); nodes != 0 || parted != 0 {
			t.Errorf("%d nodes are kept, %d of them parted, after the time for a burst", nodes, parted)
		}
		if got := send(); got < 8000 {
			t.Errorf("after a pause a connection sends %d bytes at once, want a burst", got)
		}
		cancel()
		all.end()
	})
}

// A parted node with a full bucket is forgotten, and their number is limited.
func TestPartedNodesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all, _ := limiting(NodeLimit{Rate: 1000, Burst: 10_000})
		quiet, _ := join(t, all, key.NewNode().Public())
		_ = quiet.Close()
		all.parted = maxParted
		s, far := join(t, all, key.NewNode().Public())
		go func() { _, _ = far.Write(make([]byte, 1000)) }()
		if _, err := io.ReadFull(s, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		_ = s.Close()
		if len(all.nodes) != 0 {
			t.Errorf("%d nodes are kept", len(all.nodes))
		}
		all.end()
	})
}

// A session that ended before its admission is not counted.
func TestLimitOfEndedSession(t *testing.T) {
	all, _ := limiting(slowest)
	s, _ := join(t, all, key.NewNode().Public())
	_ = s.Close()
	all.admitted(s)
	if len(all.nodes) != 0 {
		t.Errorf("%d nodes are kept", len(all.nodes))
	}
}

func TestFormatRate(t *testing.T) {
	for bytes, want := range map[int64]string{
		16_000: "128 kbit/s", 2_500_000: "20 Mbit/s", 187_500: "1.5 Mbit/s", 125_000_000: "1 Gbit/s", 100: "800 bit/s",
	} {
		if got := FormatRate(bytes); got != want {
			t.Errorf("%d bytes/s: %q, want %q", bytes, got, want)
		}
	}
}
