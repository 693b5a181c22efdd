package healthz

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// Each letter is one probe: + works, s works after a second, - is refused, . hangs.
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
		{"hanging", "+...", []string{"0s serving", "11s not serving: context deadline exceeded"}},
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
					case ".":
						<-ctx.Done()
						return 0, ctx.Err()
					}
					return time.Millisecond, nil
				}, func(serving bool, cause error) {
					line := fmt.Sprintf("%s serving", time.Since(begun))
					if !serving {
						line = fmt.Sprintf("%s not serving: %v", time.Since(begun), cause)
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
				if got, want := s.State().Failures, uint64(strings.Count(tt.probes, "-")+strings.Count(tt.probes, ".")); got != want {
					t.Errorf("%d failures, want %d", got, want)
				}
			})
		})
	}
}
