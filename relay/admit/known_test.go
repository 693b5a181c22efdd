package admit

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"
)

// switched is a source whose answer can be changed.
type switched struct{ answer atomic.Pointer[error] }

func (s *switched) set(err error) { s.answer.Store(&err) }

func (s *switched) source() Source {
	return Source{Name: "switched", Ask: func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) {
		return time.Now(), *s.answer.Load()
	}}
}

// While its source cannot tell, a node that was admitted stays welcome for the
// grace, over restarts too; all others are refused.
func TestGrace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "admitted.json")
	synctest.Test(t, func(t *testing.T) {
		var s switched
		gate := func() (*Gate, func()) {
			g := NewGate(Config{Sources: []Source{s.source()}, Grace: time.Hour, Path: path, Log: zerolog.Nop()})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() {
				done <- g.Run(ctx, Clients{List: func() map[key.NodePublic]netip.Addr { return nil }})
			}()
			return g, func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
		}
		ask := func(g *Gate, node key.NodePublic, want bool, when string) {
			t.Helper()
			if err := g.Admit(t.Context(), node, netip.Addr{}); (err == nil) != want {
				t.Errorf("%s: %v, want admitted %t", when, err, want)
			}
		}
		member, removed := key.NewNode().Public(), key.NewNode().Public()

		s.set(nil)
		g, stop := gate()
		ask(g, member, true, "while the source says yes")
		ask(g, removed, true, "while the source says yes")
		s.set(ErrRefused)
		ask(g, removed, false, "when the source says no")
		s.set(errBroken)
		ask(g, member, true, "the source is down")
		ask(g, key.NewNode().Public(), false, "a stranger, the source is down")
		ask(g, removed, false, "refused before the source was down")
		if c := g.Counts(); c.Kept != 1 || c.Unavailable != 2 {
			t.Errorf("counted %+v", c)
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

// What is admitted is on disk soon, for a relay that is killed.
func TestKnownIsSavedSoon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "admitted.json")
	synctest.Test(t, func(t *testing.T) {
		g := NewGate(Config{Sources: []Source{source("a", nil)}, Grace: time.Hour, Path: path, Log: zerolog.Nop()})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx, Clients{List: func() map[key.NodePublic]netip.Addr { return nil }}) }()
		node := key.NewNode().Public()
		_ = g.Admit(t.Context(), node, netip.Addr{})
		<-time.After(2 * saveSoon)
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Fatalf("%v, %v; want a file of mode 0600", info, err)
		}
		again := loadKnown(path, time.Hour, zerolog.Nop())
		if !again.welcome(node) {
			t.Error("the node is not in the file")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A damaged file costs the grace, never the start, and lets nobody in.
func TestKnownDamaged(t *testing.T) {
	node := key.NewNode().Public()
	future, err := json.Marshal(map[key.NodePublic]time.Time{node: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	for _, content := range []string{"", "null", "[]", `{"nodekey:12":"2026-01-01T00:00:00Z"}`, `{"` + node.String() + `":"yesterday"}`, string(future)} {
		path := filepath.Join(t.TempDir(), "admitted.json")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		k := loadKnown(path, 24*time.Hour, zerolog.Nop())
		if k.welcome(node) {
			t.Errorf("%q makes the node welcome", content)
		}
		k.admitted(node, time.Now())
		if !k.welcome(node) {
			t.Errorf("%q: nothing can be remembered", content)
		}
	}
}

// A list that is a day old must not start another day of grace.
func TestGraceCountsFromTheList(t *testing.T) {
	k := loadKnown(filepath.Join(t.TempDir(), "admitted.json"), time.Hour, zerolog.Nop())
	node := key.NewNode().Public()
	k.admitted(node, time.Now().Add(-59*time.Minute))
	if !k.welcome(node) {
		t.Error("not welcome within the grace")
	}
	k.admitted(node, time.Now().Add(-2*time.Hour)) // older news change nothing
	if !k.welcome(node) {
		t.Error("forgotten by older news")
	}
	other := key.NewNode().Public()
	k.admitted(other, time.Now().Add(-2*time.Hour))
	k.admitted(key.NewNode().Public(), time.Time{})
	if k.welcome(other) {
		t.Error("welcome beyond the grace")
	}
}
