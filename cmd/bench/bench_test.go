//go:build linux

package main

import (
	"errors"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   spread
	}{
		{[]float64{3}, spread{3, 3, 3}},
		{[]float64{5, 1, 2}, spread{2, 1, 5}},
		{[]float64{4, 1, 8, 2}, spread{3, 1, 8}},
	} {
		if got := spreadOf(c.values); got != c.want {
			t.Errorf("spread of %v: %v, want %v", c.values, got, c.want)
		}
	}
}

func TestRatios(t *testing.T) {
	// A round without a value of derper has no ratio.
	got := ratios([]float64{1, 2, 3, 4}, []float64{2, 0, 2})
	if want := []float64{0.5, 1.5}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestMean(t *testing.T) {
	// A metric that is missing from one sample has no mean.
	got := mean([]sample{{packetRate: 1, delayP99: 5, systemCallsPer: 1}, {packetRate: 2, delayP99: 0}})
	if want := (sample{packetRate: 1.5, delayP99: 2.5}); !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestOrder(t *testing.T) {
	for _, c := range []struct {
		round int
		again bool
		want  []int
	}{
		{0, false, []int{0, 1}},
		{1, false, []int{1, 0}},
		{2, true, []int{0, 1, 1, 0}},
		{3, true, []int{1, 0, 0, 1}},
	} {
		if got := order(c.round, c.again); !slices.Equal(got, c.want) {
			t.Errorf("round %d, again %t: %v, want %v", c.round, c.again, got, c.want)
		}
	}
}

func TestQuantile(t *testing.T) {
	var list []time.Duration
	if got := quantile(list, 0.99); got != 0 {
		t.Errorf("quantile of an empty list: %v", got)
	}
	for i := range 100 {
		list = append(list, time.Duration(i))
	}
	for share, want := range map[float64]time.Duration{0: 0, 0.5: 50, 0.99: 99, 1: 99} {
		if got := quantile(list, share); got != want {
			t.Errorf("%v: %d, want %d", share, got, want)
		}
	}
}

func TestSetDelays(t *testing.T) {
	s := sample{}
	s.setDelays(nil)
	if len(s) > 0 {
		t.Errorf("without delays: %v", s)
	}
	var delays []time.Duration
	for i := range 100 {
		delays = append(delays, time.Duration(100-i)*time.Millisecond) // not sorted
	}
	s.setDelays(delays)
	if want := (sample{delayMedian: 51, delayP99: 100}); !maps.Equal(s, want) {
		t.Errorf("%v, want %v", s, want)
	}
}

func TestIntervalSample(t *testing.T) {
	s := &server{Program: &program{CPUs: []int{0, 1}}}
	all := float64(runtime.NumCPU())
	for _, c := range []struct {
		machine, others float64
	}{
		{3, 0},
		{2, 0}, // the kernel's clocks differ a little
		{3 + all, 0.5},
	} {
		got, err := interval{span: 2, server: 2, load: 1, machine: c.machine, count: 1}.sample(s)
		if want := (sample{serverBusy: 0.5, loadBusy: 0.25, othersBusy: c.others}); err != nil || !maps.Equal(got, want) {
			t.Errorf("%v, %v; want %v", got, err, want)
		}
	}
	if got, err := (interval{span: 2, server: 2}).sample(s); err == nil {
		t.Errorf("%v of nothing", got)
	}
}

func TestNumber(t *testing.T) {
	for x, want := range map[float64]string{
		0: "0", 0.012345: "0.0123", 0.09996: "0.100", 0.9996: "1.00", 9.999: "10.0",
		12.34: "12.3", 999.6: "1,000", 12345: "12,300", 1234567: "1,230,000", -1234: "-1,230",
	} {
		if got := number(x); got != want {
			t.Errorf("%v: %q, want %q", x, got, want)
		}
	}
}

func TestParseStat(t *testing.T) {
	got, err := parseStat("cpu  1 2 3 1000 2000 4 5 6 0 0\ncpu0 1 2 3 1000 2000 4 5 6 0 0\n")
	if want := (1 + 2 + 3 + 4 + 5 + 6) * tick; err != nil || got != want {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	for _, text := range []string{"", "cpu 1 2 3\n", "intr 1 2 3 4 5 6 7 8 9\n", "cpu a b c d e f g h\n"} {
		if got, err := parseStat(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestParsePerf(t *testing.T) {
	got, err := parsePerf("12345,,raw_syscalls:sys_enter,1204230,100.00,,\n")
	if err != nil || got != 12345 {
		t.Errorf("%v, %v", got, err)
	}
	for _, text := range []string{"", "Error: no permission\n", "<not counted>,,raw_syscalls:sys_enter,0,100.00,,\n"} {
		if got, err := parsePerf(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestCommandLine(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"", "--derper and --derpd are not both set"},
		{"--derper a", "--derper and --derpd are not both set"},
		{"--quick --full", "use one of them"},
		{"--rounds 0", "too few (got 0)"},
		{"--only (", "missing closing"},
		{"--derpd-env X", "use NAME=VALUE"},
		{"--from x y", `unexpected argument "y"`},
		{"--derper a --derpd b --only nothing-has-this-name", "no measurement matches (got nothing-has-this-name)"},
	} {
		err := run(t.Context(), strings.Fields(c.args), io.Discard, io.Discard)
		if _, ok := errors.AsType[usageError](err); !ok || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v; want %q", c.args, err, c.want)
		}
		if code := exitCode(err, io.Discard); code != exitUsage {
			t.Errorf("%q: exit code %d", c.args, code)
		}
	}
	// One target in testdata is not reached.
	args := []string{"--from", "testdata/report.json"}
	if err := run(t.Context(), args, io.Discard, io.Discard); err != nil {
		t.Error(err)
	}
	err := run(t.Context(), append(args, "--check"), io.Discard, io.Discard)
	if code := exitCode(err, io.Discard); code != exitFailed || !strings.Contains(err.Error(), "1 targets are not reached") {
		t.Errorf("--check: %d, %v", code, err)
	}
}
