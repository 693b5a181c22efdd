package admit

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

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

// perSecond is the largest number of refused questions within one second.
func (c *counting) perSecond() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	most, from := 0, 0
	for to, at := range c.refused {
		for at.Sub(c.refused[from]) >= time.Second {
			from++
		}
		most = max(most, to-from+1)
	}
	return most
}

// retry lets nodes connect again and again, with a pause, until the returned function
// is called.
func retry(t *testing.T, g *Gate, nodes []key.NodePublic, pause time.Duration) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var trying sync.WaitGroup
	for _, node := range nodes {
		trying.Go(func() {
			for ctx.Err() == nil {
				_ = g.Admit(ctx, node, netip.Addr{})
				select {
				case <-ctx.Done():
				case <-time.After(pause):
				}
			}
		})
	}
	return func() {
		cancel()
		trying.Wait()
	}
}

func newNodes(n int) []key.NodePublic {
	nodes := make([]key.NodePublic, n)
	for i := range nodes {
		nodes[i] = newNode()
	}
	return nodes
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
		errs := make(chan error, 1000)
		for _, node := range newNodes(cap(errs)) {
			attempts.Go(func() { errs <- g.Admit(t.Context(), node, netip.Addr{}) })
		}
		attempts.Wait()
		close(errs)
		// Within the wait of one second. The last question may be asked at the very
		// moment at which its wait ends.
		const most = QuestionsAtOnce + QuestionsPerSecond
		asked := remote.questions()
		if asked != most && asked != most-1 {
			t.Errorf("%d questions, want %d or one less", asked, most)
		}
		for err := range errs {
			if !errors.Is(err, ErrRefused) && !errors.Is(err, ErrTooMany) {
				t.Errorf("%v", err)
			}
		}
		if got := g.Counts(); got != (Counts{Refused: uint64(asked), Limited: uint64(1000 - asked)}) {
			t.Errorf("counted %+v", got)
		}
		if got := g.takeRefusedKeys(); got != 1000 {
			t.Errorf("%d nodes in the summary", got)
		}
		stop := retry(t, g, newNodes(200), 20*time.Millisecond)
		<-time.After(100 * time.Millisecond)
		node := newNode()
		began := time.Now()
		err := g.Admit(t.Context(), node, netip.Addr{})
		if want := "node " + node.ShortString() + " is not admitted\ntoo many questions about unknown nodes; another attempt may succeed"; err == nil || err.Error() != want || time.Since(began) > 0 {
			t.Errorf("%v after %s, want %q at once", err, time.Since(began), want)
		}
		if s := g.States()[0]; s.Err != nil {
			t.Errorf("the limit is taken for a failure of the source: %v", s.Err)
		}
		stop()
	})
}

// Nodes that are refused and try again and again cause a limited number of questions.
// Meanwhile new members are admitted within the wait, a node that was just added
// within five seconds, and a known member at once. A removed node is disconnected by
// the next check.
func TestRefusedNodesThatRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		remote := counting{took: 5 * time.Millisecond}
		known, removed := newNode(), newNode()
		remote.add(known, removed)
		c := &crowd{here: map[key.NodePublic]netip.Addr{removed: {}}}
		g := newGate(t, remote.source())
		g.config.Interval = time.Second
		for _, node := range []key.NodePublic{known, removed} {
			if err := g.Admit(t.Context(), node, netip.Addr{}); err != nil {
				t.Fatal(err)
			}
		}
		refusedNodes := newNodes(200)
		stop := retry(t, g, refusedNodes, 200*time.Millisecond)
		<-time.After(10 * time.Second)
		admitted := func(node key.NodePublic) time.Duration {
			began := time.Now()
			for time.Since(began) < time.Minute {
				if g.Admit(t.Context(), node, netip.Addr{}) == nil {
					break
				}
				<-time.After(20 * time.Millisecond)
			}
			return time.Since(began)
		}
		if took := admitted(known); took > remote.took {
			t.Errorf("a known member was admitted after %s", took)
		}
		for range 20 {
			node := newNode()
			remote.add(node)
			if took := admitted(node); took > newcomerWait+remote.took {
				t.Errorf("a new member was admitted after %s", took)
			}
		}
		for _, node := range refusedNodes[:20] {
			remote.add(node)
			if took := admitted(node); took > 5*time.Second {
				t.Errorf("a node that was just added was admitted after %s", took)
			}
		}
		remote.mu.Lock()
		delete(remote.members, removed)
		remote.mu.Unlock()
		stopGate := run(t, g, c.clients())
		<-time.After(100 * time.Millisecond)
		synctest.Wait()
		if len(c.gone) != 1 || c.gone[0] != removed {
			t.Errorf("disconnected %v, want the removed node", c.gone)
		}
		stopGate()
		stop()
		const own = 2 // the gate's questions about its own key and the removed node
		if most := remote.perSecond(); most > QuestionsPerSecond+QuestionsAtOnce+own || most < QuestionsPerSecond {
			t.Errorf("%d refused questions within a second, want from %d to %d", most, QuestionsPerSecond, QuestionsPerSecond+QuestionsAtOnce+own)
		}
	})
}

// Strangers with a new key for each attempt cannot keep a new member out.
func TestNewKeysForEachAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		remote := counting{took: 5 * time.Millisecond}
		g := newGate(t, remote.source())
		ctx, cancel := context.WithCancel(t.Context())
		var trying sync.WaitGroup
		for range 200 {
			trying.Go(func() {
				for ctx.Err() == nil {
					_ = g.Admit(ctx, newNode(), netip.Addr{})
					<-time.After(300 * time.Millisecond)
				}
			})
		}
		<-time.After(5 * time.Second)
		for range 20 {
			member := newNode()
			remote.add(member)
			began := time.Now()
			for g.Admit(t.Context(), member, netip.Addr{}) != nil {
				<-time.After(time.Second)
			}
			if took := time.Since(began); took > newcomerWait+time.Second+againWait+remote.took {
				t.Errorf("a new member was admitted after %s", took)
			}
		}
		cancel()
		trying.Wait()
	})
}

// Strangers take half of the slots of a slow source, so that members are asked about.
// The wait for a slot is no failure of the source.
func TestStrangersLeaveSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		remote := counting{took: 2 * time.Second}
		member := newNode()
		remote.add(member)
		g := newGate(t, remote.source())
		g.memory.remember(member, time.Now())
		stop := retry(t, g, newNodes(100), 50*time.Millisecond)
		<-time.After(5 * time.Second)
		remote.mu.Lock()
		most := remote.most
		remote.mu.Unlock()
		if most != 16 {
			t.Errorf("%d concurrent questions, want 16", most)
		}
		began := time.Now()
		if err := g.Admit(t.Context(), member, netip.Addr{}); err != nil || time.Since(began) != remote.took {
			t.Errorf("a known member: %v after %s", err, time.Since(began))
		}
		if c := g.Counts(); c.Unavailable > 0 || c.Limited == 0 {
			t.Errorf("counted %+v", c)
		}
		stop()
	})
}

// The memory of refusals is limited, and a full one still remembers the last.
func TestRefusalsAreLimited(t *testing.T) {
	s := newStrangers()
	for range maxRefusals + 10 {
		s.remember(newNode())
	}
	last := newNode()
	s.remember(last)
	s.remember(last)
	if _, ok := s.refusal(last); !ok || len(s.refused) != maxRefusals {
		t.Errorf("%d refusals, the last one among them: %t", len(s.refused), ok)
	}
}
