package admit

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"
)

// The file of admitted nodes is replaced, never written in place: a kill in the
// middle leaves the old one. It belongs to the user alone.
func TestMemoryReplacesItsFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "admitted.json")
	m := loadMemory(path, time.Hour, zerolog.Nop())
	m.remember(newNode(), time.Now())
	if err := m.save(); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Link(path, path+".backup"); err != nil {
		t.Fatal(err)
	}
	m.remember(newNode(), time.Now())
	if err := m.save(); err != nil {
		t.Fatal(err)
	}
	kept, err := os.ReadFile(path + ".backup")
	if err != nil || string(kept) != string(before) {
		t.Errorf("the file was written in place: %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 || info.Size() <= int64(len(before)) {
		t.Errorf("%v, %v; want mode 0600 and two nodes", info, err)
	}
}

// While its source is unavailable, a node that was admitted stays admitted for
// the grace, over restarts too. All others are refused.
func TestGrace(t *testing.T) {
	for _, local := range []bool{false, true} {
		testGrace(t, local)
	}
}

func testGrace(t *testing.T, local bool) {
	path := filepath.Join(t.TempDir(), "admitted.json")
	synctest.Test(t, func(t *testing.T) {
		var s switched
		gate := func() (*Gate, func()) {
			source := s.source()
			source.Local = local
			g := NewGate(Config{Sources: []Source{source}, Grace: time.Hour, Path: path, Log: zerolog.Nop()})
			return g, run(t, g, (&crowd{}).clients())
		}
		ask := func(g *Gate, node key.NodePublic, want bool, when string) {
			t.Helper()
			if err := g.Admit(t.Context(), node, netip.Addr{}); (err == nil) != want {
				t.Errorf("%s: %v, want admitted %t", when, err, want)
			}
		}
		member, removed := newNode(), newNode()

		s.set(nil)
		g, stop := gate()
		ask(g, member, true, "while the source admits")
		ask(g, removed, true, "while the source admits")
		s.set(ErrRefused)
		ask(g, removed, false, "when the source refuses")
		<-time.After(refusedFor)
		s.set(errBroken)
		ask(g, member, true, "the source is down")
		ask(g, newNode(), false, "another node, the source is down")
		ask(g, removed, false, "refused before the source was down")
		if c := g.Counts(); c.Kept != 1 || c.Unavailable != 2 {
			t.Errorf("counted %+v", c)
		}
		if _, err := g.AskAll(t.Context(), member); err != nil {
			t.Errorf("AskAll about a node within the grace: %v", err)
		}
		stop()

		g, stop = gate()
		ask(g, member, true, "after a restart within the grace")
		ask(g, removed, false, "after a restart, refused before")
		<-time.After(59 * time.Minute)
		ask(g, member, true, "at the end of the grace")
		<-time.After(2 * time.Minute)
		ask(g, member, false, "after the grace")
		stop()

		g, stop = gate()
		ask(g, member, false, "after a restart beyond the grace")
		s.set(nil)
		ask(g, member, true, "the source is back")
		stop()
	})
}

// Without a grace no node is kept, but members are known for thirty days, over restarts
// too.
func TestNoGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "admitted.json")
		m := loadMemory(path, 0, zerolog.Nop())
		node := newNode()
		m.remember(node, time.Now())
		for range 30 {
			if m.holds(node) || !m.knows(node) {
				t.Errorf("held %t, known %t", m.holds(node), m.knows(node))
			}
			<-time.After(24 * time.Hour)
			if err := m.save(); err != nil {
				t.Fatal(err)
			}
			m = loadMemory(path, 0, zerolog.Nop())
		}
		<-time.After(time.Second)
		if m = loadMemory(path, 0, zerolog.Nop()); m.knows(node) {
			t.Error("known for more than thirty days")
		}
	})
}

// The memory is limited, in the file too, and loses the nodes whose last admission is the
// oldest.
func TestMemoryIsLimited(t *testing.T) {
	const limit = 100
	path := filepath.Join(t.TempDir(), "admitted.json")
	m := loadMemory(path, time.Hour, zerolog.Nop())
	if m.limit != maxNodes {
		t.Errorf("the limit is %d", m.limit)
	}
	m.limit = limit
	now := time.Now()
	oldest, newest := newNode(), newNode()
	m.remember(newest, now)
	for i := range limit - 2 {
		m.remember(newNode(), now.Add(-time.Minute+time.Duration(i)*time.Millisecond))
	}
	m.remember(oldest, now.Add(-time.Minute-time.Second))
	if len(m.nodes) != limit || !m.knows(oldest) {
		t.Errorf("%d nodes, want %d", len(m.nodes), limit)
	}
	last := newNode()
	m.remember(last, now)
	if n := len(m.nodes); n != limit*9/10+1 || m.knows(oldest) || !m.knows(newest) || !m.knows(last) {
		t.Errorf("%d nodes; the oldest one is known: %t, the newest: %t, the last: %t", n, m.knows(oldest), m.knows(newest), m.knows(last))
	}
	for len(m.nodes) < limit {
		m.nodes[newNode()] = now.Add(-time.Minute) // all of the same time, as from a list
	}
	m.remember(last, now.Add(time.Millisecond)) // a node that is known takes no place
	if n := len(m.nodes); n != limit {
		t.Errorf("%d nodes", n)
	}
	for len(m.nodes) < 2*limit { // as an older version wrote it
		m.nodes[newNode()] = now.Add(-time.Minute)
	}
	if err := m.save(); err != nil {
		t.Fatal(err)
	}
	m = &memory{path: path, grace: time.Hour, limit: limit, log: zerolog.Nop()}
	if m.load(); len(m.nodes) != limit*9/10 || !m.knows(last) {
		t.Errorf("%d nodes were read; the last one is known: %t", len(m.nodes), m.knows(last))
	}
}

// stored returns the nodes in the file.
func stored(t *testing.T, path string) map[string]time.Time {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var nodes map[string]time.Time
	if err := json.Unmarshal(data, &nodes); err != nil {
		t.Fatal(err)
	}
	if _, ok := nodes[saved.String()]; !ok {
		t.Error("the time of saving is not stored")
	}
	delete(nodes, saved.String())
	return nodes
}

// Nodes that are added or removed are written within seconds, in case the
// relay is killed. Newer times alone are written every ten minutes.
func TestMemoryIsSaved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "admitted.json")
	synctest.Test(t, func(t *testing.T) {
		var s switched
		s.set(nil)
		g := NewGate(Config{Sources: []Source{s.source()}, Grace: time.Hour, Path: path, Log: zerolog.Nop()})
		stop := run(t, g, (&crowd{}).clients())
		first, second := newNode(), newNode()
		began := time.Now()
		admit := func(node key.NodePublic) {
			_ = g.Admit(t.Context(), node, netip.Addr{})
			synctest.Wait()
		}
		admit(first)
		<-time.After(900 * time.Millisecond)
		admit(second)
		if _, err := os.Stat(path); err == nil {
			t.Error("the file was written at once, and not together with the next change")
		}
		<-time.After(200 * time.Millisecond)
		synctest.Wait()
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
			t.Fatalf("%v, %v; want a file of mode 0600", info, err)
		}
		if nodes := stored(t, path); len(nodes) != 2 || !nodes[first.String()].Equal(began) || !nodes[second.String()].Equal(began.Add(900*time.Millisecond)) {
			t.Errorf("stored %v", nodes)
		}

		<-time.After(time.Minute)
		admit(first)
		<-time.After(time.Minute)
		if at := stored(t, path)[first.String()]; !at.Equal(began) {
			t.Errorf("a newer time alone was written at once: %s", at)
		}
		<-time.After(10 * time.Minute)
		if at := stored(t, path)[first.String()]; at.Sub(began).Round(time.Second) != time.Minute+time.Second {
			t.Errorf("after ten minutes the stored time is %s after the first", at.Sub(began))
		}

		s.set(ErrRefused)
		admit(second)
		<-time.After(2 * time.Second)
		if nodes := stored(t, path); len(nodes) != 1 || nodes[first.String()].IsZero() {
			t.Errorf("stored %v after a node was refused", nodes)
		}

		// The end of the relay writes what is new.
		s.set(nil)
		third := newNode()
		admit(third)
		stop()
		if nodes := stored(t, path); len(nodes) != 2 || nodes[third.String()].IsZero() {
			t.Errorf("stored %v at the end", nodes)
		}

		// Nothing is written without a change, and old nodes go.
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		stop = run(t, g, (&crowd{}).clients())
		<-time.After(30 * time.Minute)
		if _, err := os.Stat(path); err == nil {
			t.Error("the file was written without a change")
		}
		<-time.After(knownFor)
		s.set(nil)
		admit(first)
		stop()
		if nodes := stored(t, path); len(nodes) != 1 {
			t.Errorf("stored %v, want only the node of the last thirty days", nodes)
		}
	})
}

// A file that cannot be written is tried again, and logged once.
func TestMemoryNotSaved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	path := filepath.Join(dir, "admitted.json")
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		g := NewGate(Config{Sources: []Source{source("a", nil)}, Grace: time.Hour, Path: path, Log: zerolog.New(&log)})
		stop := run(t, g, (&crowd{}).clients())
		_ = g.Admit(t.Context(), newNode(), netip.Addr{})
		<-time.After(25 * time.Minute)
		synctest.Wait()
		if n := strings.Count(log.String(), "admitted nodes not written"); n != 1 || strings.Count(log.String(), "\n") != 1 {
			t.Errorf("logged %d times:\n%s", n, &log)
		}
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		<-time.After(10 * time.Minute)
		if nodes := stored(t, path); len(nodes) != 1 {
			t.Errorf("stored %v", nodes)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		_ = g.Admit(t.Context(), newNode(), netip.Addr{})
		stop()
		if n := strings.Count(log.String(), "admitted nodes not written"); n != 2 {
			t.Errorf("logged %d times, want a second time after a success:\n%s", n, &log)
		}
	})
}

// A damaged file does not prevent the start, and admits no node.
func TestMemoryDamaged(t *testing.T) {
	node := newNode()
	for content, warns := range map[string]bool{
		"": true, "null": false, "[]": true, `{"nodekey:12":"2026-01-01T00:00:00Z"}`: true,
		`{"` + node.String() + `":"yesterday"}`: true,
	} {
		path := filepath.Join(t.TempDir(), "admitted.json")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		var log strings.Builder
		m := loadMemory(path, 24*time.Hour, zerolog.New(&log))
		if m.holds(node) {
			t.Errorf("%q admits the node", content)
		}
		if warned := strings.Contains(log.String(), `"level":"warn"`) && strings.Contains(log.String(), path); warned != warns {
			t.Errorf("%q: warned %t, want %t: %s", content, warned, warns, &log)
		}
		m.remember(node, time.Now())
		if !m.holds(node) {
			t.Errorf("%q: nothing can be remembered", content)
		}
	}
	var log strings.Builder
	if loadMemory(filepath.Join(t.TempDir(), "none"), time.Hour, zerolog.New(&log)); log.Len() > 0 {
		t.Errorf("warned about a first start: %s", &log)
	}
}

// The grace counts from the age of the answer: a list that is a day old does
// not start another day.
func TestGraceCountsFromTheAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "admitted.json")
		m := loadMemory(path, time.Hour, zerolog.Nop())
		node := newNode()
		m.remember(node, time.Now().Add(-time.Hour))
		if !m.holds(node) {
			t.Error("not held at the end of the grace")
		}
		m.remember(node, time.Now().Add(-2*time.Hour)) // an older answer changes nothing
		if !m.holds(node) {
			t.Error("forgotten after an older answer")
		}
		if err := m.save(); err != nil || len(stored(t, path)) != 1 {
			t.Errorf("%v, or a node within the grace is not stored", err)
		}
		<-time.After(time.Second)
		if m.holds(node) {
			t.Error("held beyond the grace")
		}
		m.remember(node, time.Now())
		if !m.holds(node) {
			t.Error("not held after a newer answer")
		}
		other := newNode()
		m.remember(other, time.Now().Add(-2*time.Hour))
		m.remember(newNode(), time.Time{})
		if m.holds(other) || len(m.nodes) != 2 {
			t.Errorf("holds %v", m.nodes)
		}
	})
}

// A clock that is behind at the start ends no grace, and starts after starts do not make
// it longer.
func TestMemoryClockBehind(t *testing.T) {
	path := filepath.Join(t.TempDir(), "admitted.json")
	synctest.Test(t, func(t *testing.T) {
		const year = 365 * 24 * time.Hour
		latest := time.Now().Add(10 * year)
		fresh, older, old, new := newNode(), newNode(), newNode(), newNode()
		data, err := json.Marshal(map[key.NodePublic]time.Time{
			fresh: latest, older: latest.Add(-50 * time.Minute), old: latest.Add(-61 * time.Minute),
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		var m *memory
		var stop func()
		start := func() {
			m = loadMemory(path, time.Hour, zerolog.Nop())
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			go func() { defer close(ended); m.run(ctx) }()
			stop = func() { cancel(); <-ended }
		}
		want := func(when string, nodes ...key.NodePublic) {
			t.Helper()
			for i, node := range []key.NodePublic{fresh, older, old, new, saved} {
				if got := m.holds(node); got != slices.Contains(nodes, node) {
					t.Errorf("%s: node %d has a grace: %t", when, i, got)
				}
			}
		}
		start()
		want("at first", fresh, older)
		<-time.After(9 * time.Minute)
		want("after 9 minutes", fresh, older)
		stop()
		start()
		want("after another start", fresh, older)
		<-time.After(2 * time.Minute)
		want("after 11 minutes", fresh)
		m.remember(new, time.Now().Add(-30*time.Minute))
		want("with a new node", fresh, new)
		for i := range 5 { // each with less than saveLate
			stop()
			start()
			<-time.After(9 * time.Minute)
			switch i {
			case 2:
				want("after 38 minutes", fresh, new)
			case 3:
				want("after 47 minutes", fresh)
			}
		}
		want("after 56 minutes", fresh)
		<-time.After(5 * time.Minute)
		want("after 61 minutes")
		m.remember(new, time.Now())
		stop()
		if at := stored(t, path)[new.String()]; at.Before(latest) || at.After(latest.Add(2*time.Hour)) {
			t.Errorf("admitted at %s, after %s", at, latest)
		}
		<-time.After(11 * year)
		start()
		want("with the right clock")
		now := time.Now()
		m.remember(new, now)
		want("with the right clock, admitted", new)
		stop()
		if at := stored(t, path)[new.String()]; !at.Equal(now) {
			t.Errorf("admitted at %s, want %s", at, now)
		}
	})
}
