package admit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"

	"derpd/internal/caught"
	"derpd/internal/testkit"
)

// source gives the same answer to every question.
func source(name string, err error) Source {
	return Source{Name: name, Ask: func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) {
		if err != nil && !errors.Is(err, ErrRefused) {
			return time.Time{}, err
		}
		return time.Now(), err
	}}
}

// listed is a source that answers from memory.
func listed(name string, err error) Source {
	s := source(name, err)
	s.Local = true
	return s
}

// hanging is a source that never answers.
func hanging(name string) Source {
	return Source{Name: name, Ask: func(ctx context.Context, _ key.NodePublic, _ netip.Addr) (time.Time, error) {
		<-ctx.Done()
		return time.Time{}, ctx.Err()
	}}
}

var errBroken = errors.New("connection refused")

func newGate(t *testing.T, sources ...Source) *Gate {
	t.Helper()
	return NewGate(Config{Sources: sources, Grace: time.Hour, Path: filepath.Join(t.TempDir(), "admitted.json"), Log: zerolog.Nop()})
}

// run runs the gate. The returned function stops it, and waits for the end.
func run(t *testing.T, g *Gate, clients Clients) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- g.Run(ctx, clients) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func newNode() key.NodePublic { return key.NewNode().Public() }

func TestGate(t *testing.T) {
	for _, tt := range []struct {
		name    string
		sources []Source
		want    string // in the refusal; empty if the node is admitted
		counts  Counts
	}{
		{"no source", nil, "is not admitted", Counts{Refused: 1}},
		{"admits", []Source{source("a", nil)}, "", Counts{Admitted: 1}},
		{"refuses", []Source{source("a", ErrRefused)}, "a: unknown node key", Counts{Refused: 1}},
		{"wrapped refusal", []Source{source("a", fmt.Errorf("not here: %w", ErrRefused))}, "a: not here: unknown node key", Counts{Refused: 1}},
		{"broken", []Source{source("a", errBroken)}, "a: connection refused", Counts{Unavailable: 1}},
		{"refuses and admits", []Source{source("a", ErrRefused), source("b", nil)}, "", Counts{Admitted: 1}},
		{"both refuse", []Source{source("a", ErrRefused), source("b", ErrRefused)}, "b: unknown node key", Counts{Refused: 1}},
		{"broken and admits", []Source{source("a", errBroken), source("b", nil)}, "", Counts{Admitted: 1}},
		{"refuses and broken", []Source{source("a", ErrRefused), source("b", errBroken)}, "b: connection refused", Counts{Unavailable: 1}},
		{"broken and refuses", []Source{source("a", errBroken), source("b", ErrRefused)}, errUnavailable.Error(), Counts{Unavailable: 1}},
		{"listed", []Source{source("a", errBroken), listed("b", nil)}, "", Counts{Admitted: 1}},
		{"not listed, admitted", []Source{listed("a", ErrRefused), source("b", nil)}, "", Counts{Admitted: 1}},
		{"not listed", []Source{listed("a", ErrRefused)}, "a: unknown node key", Counts{Refused: 1}},
		{"stale list", []Source{listed("a", errBroken), source("b", ErrRefused)}, "a: connection refused", Counts{Unavailable: 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGate(t, tt.sources...)
			node := newNode()
			// AskAll first: Admit would put the node into the memory.
			answers, err := g.AskAll(t.Context(), node)
			if (err == nil) != (tt.want == "") || len(answers) != len(tt.sources) {
				t.Errorf("AskAll: %d answers and %v, want %d and %q", len(answers), err, len(tt.sources), tt.want)
			}
			if errors.Is(err, ErrRefused) != (tt.counts.Refused == 1) {
				t.Errorf("AskAll: %v, want a refusal: %t", err, tt.counts.Refused == 1)
			}
			if got := g.Counts(); got != (Counts{}) {
				t.Errorf("AskAll counted %+v", got)
			}
			for i, a := range answers {
				_, want := tt.sources[i].Ask(t.Context(), node, netip.Addr{})
				if a.Source != tt.sources[i].Name || !errors.Is(a.Err, want) || a.AsOf.IsZero() != (want != nil && !errors.Is(want, ErrRefused)) {
					t.Errorf("answer %d: %+v, want %v of %s", i, a, want, tt.sources[i].Name)
				}
			}

			err = g.Admit(t.Context(), node, netip.Addr{})
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q in it", err, tt.want)
			}
			if err != nil && !strings.Contains(err.Error(), "node "+node.ShortString()+" is not admitted") {
				t.Errorf("%v, want the node in it", err)
			}
			if got := g.Counts(); got != tt.counts {
				t.Errorf("counted %+v, want %+v", got, tt.counts)
			}
			for i, s := range g.States() {
				_, want := tt.sources[i].Ask(t.Context(), node, netip.Addr{})
				if errors.Is(want, ErrRefused) {
					want = nil
				}
				if s.Source != tt.sources[i].Name || !errors.Is(s.Err, want) || s.AsOf.IsZero() != (want != nil) {
					t.Errorf("state %d: %+v, want %v of %s", i, s, want, tt.sources[i].Name)
				}
			}
		})
	}
}

// Admission does not wait for a source that hangs, and a node that a local
// source admits is no question to any other source.
func TestFirstAdmits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, hanging("slow"), source("fast", nil))
		began := time.Now()
		if err := g.Admit(t.Context(), newNode(), netip.Addr{}); err != nil || time.Since(began) > 0 {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		synctest.Wait()
		if s := g.States()[0]; s.Err != nil {
			t.Errorf("a source whose question was dropped counts as unavailable: %v", s.Err)
		}
		never := Source{Name: "never", Ask: func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) {
			t.Error("asked about a node that a list admits")
			return time.Time{}, nil
		}}
		g = newGate(t, never, listed("list", nil))
		if err := g.Admit(t.Context(), newNode(), netip.Addr{}); err != nil {
			t.Error(err)
		}
	})
}

// All sources are asked at the same time, and for three seconds at most.
func TestAskTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, hanging("a"), hanging("b"), source("c", ErrRefused))
		for name, ask := range map[string]func() error{
			"Admit": func() error { return g.Admit(t.Context(), newNode(), netip.Addr{}) },
			"AskAll": func() error {
				_, err := g.AskAll(t.Context(), newNode())
				return err
			},
		} {
			began := time.Now()
			if err := ask(); !errors.Is(err, errUnavailable) || time.Since(began) != 3*time.Second {
				t.Errorf("%s: %v after %s, want unavailable after 3 s", name, err, time.Since(began))
			}
		}
		slow := source("slow", ErrRefused)
		slow.Ask = func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) {
			<-time.After(2 * time.Second)
			return time.Now(), ErrRefused
		}
		began := time.Now()
		if _, err := newGate(t, slow, slow).AskAll(t.Context(), newNode()); !errors.Is(err, ErrRefused) || time.Since(began) != 2*time.Second {
			t.Errorf("AskAll: %v after %s, want a refusal after 2 s", err, time.Since(began))
		}
		began = time.Now()
		if err := newGate(t, slow, slow).Admit(t.Context(), newNode(), netip.Addr{}); !errors.Is(err, ErrRefused) || time.Since(began) != 2*time.Second {
			t.Errorf("Admit: %v after %s, want a refusal after 2 s", err, time.Since(began))
		}
		for i, want := range []error{context.DeadlineExceeded, context.DeadlineExceeded, nil} {
			if s := g.States()[i]; !errors.Is(s.Err, want) {
				t.Errorf("%s: %v, want %v", s.Source, s.Err, want)
			}
		}
	})
}

// A change of a source's state is logged once, and its last answer stays.
func TestSourceState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		var s switched
		g := NewGate(Config{Sources: []Source{s.source()}, Grace: time.Hour, Path: filepath.Join(t.TempDir(), "admitted.json"), Log: zerolog.New(&log)})
		if state := g.States()[0]; state.Source != "switched" || !state.AsOf.IsZero() || state.Err != nil {
			t.Errorf("before the first question: %+v", state)
		}
		began := time.Now()
		for _, step := range []struct {
			answer error
			asOf   time.Duration // since the start, of the last answer
			lines  int
		}{
			{ErrRefused, 0, 0},
			{errBroken, 0, 1},
			{errors.New("timeout"), 0, 1},
			{ErrRefused, 3 * time.Minute, 2},
			{nil, 4 * time.Minute, 2},
			{errBroken, 4 * time.Minute, 3},
			{nil, 6 * time.Minute, 4},
		} {
			s.set(step.answer)
			_ = g.Admit(t.Context(), newNode(), netip.Addr{})
			want := step.answer
			if errors.Is(want, ErrRefused) {
				want = nil
			}
			if state := g.States()[0]; !errors.Is(state.Err, want) || state.AsOf.Sub(began) != step.asOf {
				t.Errorf("after %v: %v as of %s, want as of %s", step.answer, state.Err, state.AsOf.Sub(began), step.asOf)
			}
			if n := strings.Count(log.String(), "\n"); n != step.lines {
				t.Errorf("after %v: %d lines, want %d:\n%s", step.answer, n, step.lines, &log)
			}
			<-time.After(time.Minute)
		}
		lines := strings.Split(log.String(), "\n")
		for i, want := range []string{"admission source unavailable", "admission source answers again"} {
			if !strings.Contains(lines[i], want) || !strings.Contains(lines[i], `"source":"switched"`) {
				t.Errorf("line %d: %s, want %q in it", i, lines[i], want)
			}
		}
		if want := `"level":"warn","error":"connection refused","source":"switched","grace_ms":3600000`; !strings.Contains(lines[0], want) {
			t.Errorf("%s, want %s in it", lines[0], want)
		}
	})
}

// States asks local sources, so that they are current, and no others.
func TestStates(t *testing.T) {
	problem := errors.New("the file is broken")
	far := source("far", nil)
	far.Ask = func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) {
		t.Error("a source that is not local was asked")
		return time.Now(), nil
	}
	near := listed("near", ErrRefused)
	near.Problem = func() error { return problem }
	g := newGate(t, far, near, listed("broken", errBroken))
	states := g.States()
	if s := states[0]; !s.AsOf.IsZero() || s.Err != nil || s.Problem != nil {
		t.Errorf("%+v", s)
	}
	if s := states[1]; s.AsOf.IsZero() || s.Err != nil || !errors.Is(s.Problem, problem) {
		t.Errorf("%+v", s)
	}
	if s := states[2]; !errors.Is(s.Err, errBroken) || s.Problem != nil {
		t.Errorf("%+v", s)
	}
	if got := g.Sources(); !slices.Equal(got, []string{"far", "near", "broken"}) {
		t.Errorf("sources %q", got)
	}
}

// An answer without an age leaves the age of the last one, and is not
// remembered.
func TestAnswerWithoutAge(t *testing.T) {
	node, asOf := newNode(), time.Now()
	var failure error
	g := newGate(t, Source{Name: "a", Ask: func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) { return asOf, failure }})
	_ = g.Admit(t.Context(), newNode(), netip.Addr{})
	was := asOf
	asOf = time.Time{}
	if err := g.Admit(t.Context(), node, netip.Addr{}); err != nil || !g.States()[0].AsOf.Equal(was) {
		t.Errorf("%v, %+v", err, g.States()[0])
	}
	failure = errBroken
	if err := g.Admit(t.Context(), node, netip.Addr{}); err == nil {
		t.Error("the node is admitted by the grace")
	}
}

// AskAll asks as if the node connected from this host, and Admit with the
// node's address.
func TestAskedAddress(t *testing.T) {
	var asked atomic.Value
	s := source("a", nil)
	s.Ask = func(_ context.Context, _ key.NodePublic, addr netip.Addr) (time.Time, error) {
		asked.Store(addr)
		return time.Now(), nil
	}
	g := newGate(t, s)
	if _, err := g.AskAll(t.Context(), newNode()); err != nil || asked.Load() != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("AskAll: asked with %v, %v", asked.Load(), err)
	}
	addr := netip.MustParseAddr("2001:db8::7")
	if err := g.Admit(t.Context(), newNode(), addr); err != nil || asked.Load() != addr {
		t.Errorf("Admit: asked with %v, %v", asked.Load(), err)
	}
}

// A panic of a source is an answer without a decision: it admits nobody, and the other
// sources go on. Questions run on goroutines of their own.
func TestPanicOfASource(t *testing.T) {
	member := newNode()
	var log bytes.Buffer
	broken := "broken " + member.ShortString() // a kind of panic is logged once a minute
	g := NewGate(Config{
		Sources: []Source{
			{Name: broken, Ask: func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) { panic("of a source") }},
			{Name: "good", Ask: func(_ context.Context, node key.NodePublic, _ netip.Addr) (time.Time, error) {
				if node == member {
					return time.Now(), nil
				}
				return time.Now(), ErrRefused
			}},
		},
		Path: filepath.Join(t.TempDir(), "admitted.json"), Log: zerolog.New(&log),
	})
	before := caught.Count()
	if err := g.Admit(t.Context(), member, netip.Addr{}); err != nil {
		t.Errorf("the member: %v", err)
	}
	if err := g.Admit(t.Context(), newNode(), netip.Addr{}); !IsUnavailable(err) {
		t.Errorf("a stranger: %v", err)
	}
	if _, err := g.AskAll(t.Context(), newNode()); !IsUnavailable(err) {
		t.Errorf("AskAll: %v", err)
	}
	// The member is admitted before the broken source has ended.
	testkit.Until(t, "three panics are counted", func() bool { return caught.Count()-before == 3 })
	if text := log.String(); !strings.Contains(text, `"in":"question to `+broken) || !strings.Contains(text, "admit_test.go") {
		t.Errorf("no stack in %s", text)
	}
}
