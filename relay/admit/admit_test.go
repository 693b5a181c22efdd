package admit

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"
)

func source(name string, err error) Source {
	return Source{name, func(context.Context, key.NodePublic, netip.Addr) error { return err }}
}

func TestGate(t *testing.T) {
	broken := errors.New("connection refused")
	for _, tt := range []struct {
		name    string
		sources []Source
		want    string // in the refusal; empty for a yes
		down    string
	}{
		{"no source", nil, "is not admitted", ""},
		{"yes", []Source{source("a", nil)}, "", ""},
		{"no", []Source{source("a", ErrRefused)}, "a: unknown node key", ""},
		{"no and yes", []Source{source("a", ErrRefused), source("b", nil)}, "", ""},
		{"broken and yes", []Source{source("a", broken), source("b", nil)}, "", ""},
		{"no and broken", []Source{source("a", ErrRefused), source("b", broken)}, "b: connection refused", "b"},
	} {
		g := NewGate(tt.sources, zerolog.Nop())
		err := g.Admit(t.Context(), key.NewNode().Public(), netip.Addr{})
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q in it", tt.name, err, tt.want)
		}
		if down := g.Down(); tt.down != "" && down[tt.down] == nil {
			t.Errorf("%s: %v is not in what is down", tt.name, tt.down)
		}
	}
}

// A yes need not wait for a source that hangs.
func TestFirstYesWins(t *testing.T) {
	hang := Source{"slow", func(ctx context.Context, _ key.NodePublic, _ netip.Addr) error {
		<-ctx.Done()
		return ctx.Err()
	}}
	g := NewGate([]Source{hang, source("fast", nil)}, zerolog.Nop())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := g.Admit(ctx, key.NewNode().Public(), netip.Addr{}); err != nil {
		t.Error(err)
	}
}

// A source that comes back is no longer called down.
func TestSourceComesBack(t *testing.T) {
	answer := errors.New("timeout")
	g := NewGate([]Source{{"a", func(context.Context, key.NodePublic, netip.Addr) error { return answer }}}, zerolog.Nop())
	_ = g.Admit(t.Context(), key.NewNode().Public(), netip.Addr{})
	if len(g.Down()) != 1 {
		t.Error("a source that timed out is not down")
	}
	answer = ErrRefused
	_ = g.Admit(t.Context(), key.NewNode().Public(), netip.Addr{})
	if len(g.Down()) != 0 {
		t.Error("a source that answered no is down")
	}
}

func TestParseKeys(t *testing.T) {
	a, b := key.NewNode().Public(), key.NewNode().Public()
	keys, err := ParseKeys("# two nodes\n" + a.String() + ", " + b.String() + " # phone\r\n\n" + a.String())
	if err != nil || len(keys) != 2 || keys.ask(a) != nil || keys.ask(b) != nil {
		t.Errorf("%v, %v", keys, err)
	}
	if err := keys.ask(key.NewNode().Public()); !errors.Is(err, ErrRefused) {
		t.Errorf("a stranger: %v", err)
	}
	for text, want := range map[string]string{
		"":                                      "holds no node key",
		"# only a comment":                      "holds no node key",
		"x\n" + a.String() + "\nnodekey:zz":     "line 3",
		"nodekey:" + strings.Repeat("0", 64):    `line 1: want nodekey: and 64 hex digits`,
		"mkey:" + strings.Repeat("a", 64):       "line 1",
		"privkey:" + strings.Repeat("5ecfe", 9): "got a private key",
	} {
		_, err := ParseKeys(text)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q in it", text, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "5ecfe") {
			t.Errorf("the message shows a private key: %v", err)
		}
	}
}

func FuzzParseKeys(f *testing.F) {
	f.Add("nodekey:" + strings.Repeat("ab", 32) + "\n# x\nnodekey:12, y")
	f.Add("\x00\xff,,,##\n\r")
	f.Fuzz(func(t *testing.T, text string) {
		keys, err := ParseKeys(text)
		if err == nil && len(keys) == 0 {
			t.Error("no key and no error")
		}
		for k := range keys {
			if k.IsZero() {
				t.Error("the zero key was taken")
			}
		}
	})
}

// Nothing but a JSON object whose Allow is true is a yes.
func FuzzParseAnswer(f *testing.F) {
	for _, seed := range []string{`{"Allow":true}`, `{"Allow":false}`, `{"allow":true}`, `{}`, `<html>`, `{"Allow":"true"}`, `[true]`, `{"Allow":true`, `true`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, answer string) {
		if parseAnswer(strings.NewReader(answer)) == nil && !strings.Contains(answer, "true") {
			t.Errorf("%q is a yes", answer)
		}
	})
}

func TestRedacted(t *testing.T) {
	if got := redacted("https://user:pass@h.example.com/verify?token=1#x"); got != "https://h.example.com/verify" {
		t.Errorf("got %s", got)
	}
}
