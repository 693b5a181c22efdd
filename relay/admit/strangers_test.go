package admit

import (
	"context"
	"crypto/rand"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go4.org/mem"
	"tailscale.com/types/key"
)

// counting is a source with a list of members. It counts the questions, and takes a
// time for each answer.
type counting struct {
	took time.Duration

	mu      sync.Mutex
	members map[key.NodePublic]bool
	asked   []time.Time
	refused []time.Time // questions that were refused
	running int
	most    int // concurrent questions
}

func (c *counting) source() Source {
	return Source{Name: "counting", Ask: func(ctx context.Context, node key.NodePublic, _ netip.Addr) (time.Time, error) {
		c.mu.Lock()
		now := time.Now()
		c.asked = append(c.asked, now)
		c.running++
		c.most = max(c.most, c.running)
		c.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(c.took):
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.running--
		if c.members[node] {
			return time.Now(), nil
		}
		c.refused = append(c.refused, now)
		return now, ErrRefused
	}}
}

func (c *counting) add(nodes ...key.NodePublic) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.members == nil {
		c.members = make(map[key.NodePublic]bool)
	}
	for _, node := range nodes {
		c.members[node] = true
	}
}

func (c *counting) questions() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.asked)
}

// randomNode is a key that nobody has. It costs no time.
func randomNode() key.NodePublic {
	var raw [32]byte
	_, _ = rand.Read(raw[:])
	return key.NodePublicFromRaw32(mem.B(raw[:]))
}

// numberedAddr is one of many addresses of 127.0.0.0/8.
func numberedAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)})
}

// A refusal answers the next attempts for three seconds. A local source is asked all
// the same, and a node that was added is admitted afterwards.
func TestRefusalIsRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var remote counting
		listedNow := ErrRefused
		near := Source{Name: "near", Local: true, Ask: func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) {
			return time.Now(), listedNow
		}}
		g := newGate(t, near, remote.source())
		node := newNode()
		want := func(when, text string, questions int) {
			t.Helper()
			err := g.Admit(t.Context(), node, netip.Addr{})
			got := "admitted"
			if err != nil {
				got = strings.ReplaceAll(err.Error(), node.ShortString(), "NODE")
			}
			if got != text || remote.questions() != questions {
				t.Errorf("%s: %q after %d questions, want %q after %d", when, got, remote.questions(), text, questions)
			}
		}
		const refusal = "node NODE is not admitted\nnear: unknown node key\ncounting: unknown node key"
		want("at first", refusal, 1)
		want("at once", "node NODE is not admitted\nunknown node key; the sources are asked again in 3s", 1)
		<-time.After(2900 * time.Millisecond)
		want("after 2.9 s", "node NODE is not admitted\nunknown node key; the sources are asked again in 100ms", 1)
		if err := g.Admit(t.Context(), node, netip.Addr{}); !errors.Is(err, ErrRefused) {
			t.Errorf("a remembered refusal is no refusal: %v", err)
		}
		remote.add(node)
		<-time.After(100 * time.Millisecond)
		want("added, after 3 s", "admitted", 2)
		remote.members = nil
		want("removed", refusal, 3)
		listedNow = nil
		want("added to the local source", "admitted", 3)
		if got := g.Counts(); got != (Counts{Admitted: 2, Refused: 5}) {
			t.Errorf("counted %+v", got)
		}
	})
}

// A node that a source admits has no refusal, although another question was answered
// with a refusal before.
func TestAdmissionForgetsRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var remote counting
		g := newGate(t, remote.source())
		node := newNode()
		_ = g.Admit(t.Context(), node, netip.Addr{})
		remote.add(node)
		if d, err := g.decide(t.Context(), node, netip.Addr{}); d != admitted { // as a recheck does
			t.Error(err)
		}
		g.memory.forget(node) // so that only the refusal counts
		if err := g.Admit(t.Context(), node, netip.Addr{}); err != nil {
			t.Error(err)
		}
	})
}

// Many strangers at the same time cause a limited number of questions. The others are
// refused without one.
func TestStrangersAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var remote counting
		g := newGate(t, remote.source())
		var attempts sync.WaitGroup
		var limited atomic.Int32
		began := time.Now()
		for i := range 1000 {
			attempts.Go(func() {
				err := g.Admit(t.Context(), randomNode(), numberedAddr(i))
				switch {
				case errors.Is(err, ErrTooMany):
					limited.Add(1)
					if time.Since(began) > 0 || errors.Is(err, ErrTooManyForLong) {
						t.Errorf("%v after %s", err, time.Since(began))
					}
				case !errors.Is(err, ErrRefused):
					t.Errorf("%v", err)
				}
			})
		}
		attempts.Wait()
		const asked = 5 // of one lane: three at once, and five a second within the wait
		if got := remote.questions(); got != asked || limited.Load() != 1000-asked {
			t.Errorf("%d questions, and %d refused without; want %d", got, limited.Load(), asked)
		}
		if got := g.Counts(); got != (Counts{Refused: asked, Limited: 1000 - asked}) {
			t.Errorf("counted %+v", got)
		}
		if got := g.takeRefusedKeys(); got != 1000 {
			t.Errorf("%d nodes in the summary", got)
		}
		if s := g.States()[0]; s.Err != nil {
			t.Errorf("the limit is taken for a failure of the source: %v", s.Err)
		}
	})
}

// A node may use the lanes of its kind, and no flood of another kind takes all of them.
// One address has a part of each lane.
func TestLanes(t *testing.T) {
	now := time.Now()
	home := netip.MustParseAddr("192.0.2.1")
	isHome := func(addr netip.Addr) bool { return addr == home }
	const (
		each       = laneAtOnce + int(lanePerSecond*maxWait/time.Second)    // questions of one lane within the wait
		ofAddress  = laneAtOnce + int(addressPerSecond*maxWait/time.Second) // of one address in it
		someone    = "2001:db8:0:1::1"
		neighbour  = "2001:db8:0:1:ffff::2"
		other      = "2001:db8:0:2::1"
		manyPlaces = ""
	)
	type attempts struct {
		kind  int
		addr  string
		asked int // of 100 attempts
	}
	for name, steps := range map[string][]attempts{
		"first attempts":            {{firstLane, manyPlaces, each}, {againLane, manyPlaces, each}, {refusedLane, manyPlaces, each}},
		"nodes that try again":      {{againLane, manyPlaces, 2 * each}, {firstLane, manyPlaces, 0}, {refusedLane, manyPlaces, each}, {firstLane, home.String(), ofAddress}},
		"refused nodes":             {{refusedLane, manyPlaces, each}, {firstLane, manyPlaces, each}, {againLane, manyPlaces, each}},
		"one address":               {{firstLane, someone, ofAddress}, {firstLane, neighbour, 0}, {firstLane, other, each - ofAddress}},
		"one address, other lanes":  {{firstLane, someone, ofAddress}, {againLane, someone, ofAddress}, {refusedLane, someone, ofAddress}},
		"the address of a member":   {{firstLane, home.String(), 2 * ofAddress}, {againLane, home.String(), ofAddress}},
		"IPv4, and the same mapped": {{firstLane, "::ffff:198.51.100.1", ofAddress}, {firstLane, "198.51.100.1", 0}, {firstLane, "198.51.100.2", each - ofAddress}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStrangers(isHome)
			for i, step := range steps {
				asked := 0
				for j := range 100 {
					node := randomNode()
					switch step.kind {
					case againLane:
						_ = s.tooMany(node, now)
					case refusedLane:
						s.refused.Set(node, now.Add(-refusedFor))
					}
					addr := numberedAddr(j)
					if step.addr != manyPlaces {
						addr = netip.MustParseAddr(step.addr)
					}
					_, wait, err := s.reserve(node, addr, now)
					if err == nil {
						asked++
					}
					if err != nil && !errors.Is(err, ErrTooMany) || wait > maxWait {
						t.Errorf("%v, after %s", err, wait)
					}
				}
				if asked != step.asked {
					t.Errorf("step %d: %d questions, want %d", i+1, asked, step.asked)
				}
			}
		})
	}
}

// A node that exceeds the limits for five seconds has another error, and a node that was
// admitted or refused since is a new one.
func TestTooManyForLong(t *testing.T) {
	s := newStrangers(nil)
	node, now := randomNode(), time.Now()
	for _, step := range []struct {
		after time.Duration
		long  bool
	}{{0, false}, {4999 * time.Millisecond, false}, {5 * time.Second, true}, {time.Hour, true}} {
		if err := s.tooMany(node, now.Add(step.after)); !errors.Is(err, ErrTooMany) || errors.Is(err, ErrTooManyForLong) != step.long {
			t.Errorf("after %s: %v", step.after, err)
		}
	}
	for name, end := range map[string]func(key.NodePublic){"admitted": s.forget, "refused": s.remember} {
		_ = s.tooMany(node, now)
		end(node)
		if err := s.tooMany(node, now.Add(time.Hour)); errors.Is(err, ErrTooManyForLong) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Each lane of a slow source has slots of its own, and so have members. The wait for a
// slot is no failure of the source.
func TestSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		remote := counting{took: 2 * time.Second}
		g := newGate(t, remote.source())
		var asking sync.WaitGroup
		together := func(n int, nodes func() key.NodePublic) {
			for i := range n {
				asking.Go(func() { _ = g.Admit(t.Context(), nodes(), numberedAddr(i)) })
			}
		}
		running := func() int {
			synctest.Wait()
			remote.mu.Lock()
			defer remote.mu.Unlock()
			return remote.running
		}
		together(100, randomNode)
		<-time.After(time.Second)
		if got := running(); got != laneRunning {
			t.Errorf("%d questions about new nodes, want %d", got, laneRunning)
		}
		member := func() key.NodePublic {
			node := randomNode()
			remote.add(node)
			g.memory.remember(node, time.Now())
			return node
		}
		began := time.Now()
		together(membersAtOnce, member)
		if got := running(); got != laneRunning+membersAtOnce {
			t.Errorf("%d questions, want those about %d members too", got, membersAtOnce)
		}
		// One more member keeps its grace, and one that is known for long is no stranger.
		if err := g.Admit(t.Context(), member(), numberedAddr(0)); err != nil || time.Since(began) != memberWait {
			t.Errorf("one member more: %v after %s", err, time.Since(began))
		}
		asking.Wait()
		if took := time.Since(began); took != remote.took {
			t.Errorf("members were admitted after %s", took)
		}
		if c := g.Counts(); c.Admitted != membersAtOnce || c.Kept != 1 || c.Unavailable > 0 || c.Refused != laneRunning {
			t.Errorf("counted %+v", c)
		}
		long := randomNode()
		g.memory.nodes[long] = time.Now().Add(-29 * 24 * time.Hour)
		together(membersAtOnce, member)
		synctest.Wait()
		if err := g.Admit(t.Context(), long, numberedAddr(0)); !errors.Is(err, ErrTooMany) {
			t.Errorf("a member beyond its grace: %v", err)
		}
		asking.Wait()
		if s := g.States()[0]; s.Err != nil {
			t.Errorf("the state is %v", s.Err)
		}
	})
}

// The tables of strangers are limited, and lose the oldest element.
func TestStrangersTablesAreLimited(t *testing.T) {
	s := newStrangers(nil)
	first, last := randomNode(), randomNode()
	now := time.Now()
	s.remember(first)
	for i := range maxStrangers {
		s.remember(randomNode())
		_, _, _ = s.reserve(randomNode(), netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), now)
	}
	s.remember(last)
	_, _, _ = s.reserve(last, numberedAddr(0), now)
	for i := range 100 {
		_, _, _ = s.reserve(randomNode(), numberedAddr(i), now)
	}
	if s.refused.Contains(first) || !s.refused.Contains(last) {
		t.Error("the last refusal is lost, or the first is kept")
	}
	if r, l, a := s.refused.Len(), s.limited.Len(), s.addresses.Len(); r != maxStrangers || l != maxStrangers || a != maxStrangers {
		t.Errorf("%d refusals, %d nodes and %d addresses, want %d", r, l, a, maxStrangers)
	}
}
