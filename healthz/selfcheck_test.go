package healthz

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"tailscale.com/types/key"
)

var errBusy = errors.New("too busy")

// Each letter is one probe: + works, s works after a second, l after three, b is explained by an overload, - is refused, . hangs.
func TestSelfCheck(t *testing.T) {
	for _, tt := range []struct {
		name, probes string
		want         []string // calls of changed, and when
	}{
		{"a start needs one success", "++++", []string{"0s serving"}},
		{"a start that comes late", "-+", []string{"1s serving"}},
		{"a start that fails is reported once", "-----+", []string{"2s not serving: refused", "5s serving"}},
		{"a slow probe keeps the pace", "+ss---", []string{"0s serving", "11s not serving: refused"}},
		{"refused at once", "+++---", []string{"0s serving", "11s not serving: refused"}},
		{"hanging", "+..", []string{"0s serving", "11s not serving: context deadline exceeded"}},
		{"hanging once, then refused", "+.---", []string{"0s serving", "7s not serving: refused"}},
		{"a start that hangs", "...+", []string{"8s not serving: context deadline exceeded", "12s serving"}},
		{"slow", "+.l.l++++", []string{"0s serving", "9s overloaded: a packet between two clients took 3s", "23s serving"}},
		{"slow, then broken", "+.l---", []string{"0s serving", "9s overloaded: a packet between two clients took 3s", "10s serving", "12s not serving: refused"}},
		{"busy", "+bbbbbb+++", []string{"0s serving", "3s overloaded: of a test", "15s serving"}},
		{"busy, then hanging", "+bbb..", []string{"0s serving", "3s overloaded: of a test", "14s not serving: context deadline exceeded"}},
		{"busy, then refused", "+bb---", []string{"0s serving", "3s overloaded: of a test", "5s serving", "7s not serving: refused"}},
		{"busy at the start", "bbb+", []string{"2s not serving: too busy", "3s serving"}},
		{"one and two failures in between", "+-+--+", []string{"0s serving"}},
		{"back after two successes", "+---+-++", []string{"0s serving", "5s not serving: refused", "9s serving"}},
		{"back, and gone again", "+---++---", []string{"0s serving", "5s not serving: refused", "7s serving", "12s not serving: refused"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				begun := time.Now()
				probes := strings.Split(tt.probes, "")
				var said []string
				s := NewSelfCheck(func(ctx context.Context) (time.Duration, error) {
					if len(probes) == 0 {
						cancel()
						return 0, errors.New("the test is over")
					}
					outcome := probes[0]
					probes = probes[1:]
					switch outcome {
					case "-":
						return 0, errors.New("refused")
					case "s":
						<-time.After(time.Second)
						return time.Second, nil
					case "b":
						return 0, errBusy
					case "l":
						<-time.After(3 * time.Second)
						return 3 * time.Second, nil
					case ".":
						<-ctx.Done()
						return 0, ctx.Err()
					}
					return time.Millisecond, nil
				}, func(err error) error {
					if errors.Is(err, errBusy) {
						return errors.New("of a test")
					}
					return nil
				}, func(state State) {
					line := fmt.Sprintf("%s serving", time.Since(begun))
					if state.Overload != nil {
						line = fmt.Sprintf("%s overloaded: %v", time.Since(begun), state.Overload)
					}
					if !state.Serving {
						line = fmt.Sprintf("%s not serving: %v", time.Since(begun), state.Err)
					}
					said = append(said, line)
				})
				if state := s.State(); state.Serving || !errors.Is(state.Err, errUnchecked) {
					t.Errorf("before the first probe: %+v", state)
				}
				if err := s.Run(ctx); err != nil {
					t.Error(err)
				}
				if !slices.Equal(said, tt.want) {
					t.Errorf("said %q, want %q", said, tt.want)
				}
				if got, want := s.State().Failures, uint64(strings.Count(tt.probes, "-")+strings.Count(tt.probes, ".")+strings.Count(tt.probes, "b")); got != want {
					t.Errorf("%d failures, want %d", got, want)
				}
			})
		})
	}
}

// A probe's error wraps the cause, which derphttp does not wrap.
func TestProbeErrorHasItsCause(t *testing.T) {
	for _, cause := range []error{syscall.EMFILE, context.DeadlineExceeded} {
		probe := DERPProbe{
			Host: "127.0.0.1", From: key.NewNode(), To: key.NewNode(),
			Dial: func(context.Context) (net.Conn, error) { return nil, &net.OpError{Op: "dial", Err: cause} },
		}
		if _, err := probe.Run(t.Context()); !errors.Is(err, cause) {
			t.Errorf("%v does not wrap %v", err, cause)
		}
	}
	ours, theirs := net.Pipe()
	defer func() { _, _ = ours.Close(), theirs.Close() }()
	probe := DERPProbe{Host: "127.0.0.1", From: key.NewNode(), To: key.NewNode(), Dial: func(context.Context) (net.Conn, error) { return ours, nil }}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := probe.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a relay that is silent: %v", err)
	}
}
