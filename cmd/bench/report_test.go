//go:build linux

package main

import (
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"derpd/internal/testrelay"
)

var update = flag.Bool("update", false, "write the expected reports")

// Every target names a measurement of each selection, and a metric with a ratio.
func TestTargetsAreMeasured(t *testing.T) {
	for name, o := range map[string]options{"default": {}, "full": {full: true}} {
		var measured []string
		for _, m := range selection(o) {
			measured = append(measured, m.name)
		}
		for _, target := range targets() {
			if !slices.Contains(measured, target.measurement) {
				t.Errorf("%s: the target %q is not measured", name, target.measurement)
			}
			if rank(target.metric) < 0 || !isCompared(target.metric) || target.en == "" || target.zh == "" || target.unit == "" {
				t.Errorf("%q: %q has no rank, label or unit", target.measurement, target.metric)
			}
		}
	}
	only := selection(options{quick: true, only: regexp.MustCompile("^STUN")})
	if len(only) != 2 || only[0].name != stunName(1) {
		t.Errorf("--only ^STUN selects %v", only)
	}
}

// The limits of the targets, as ratios to derper. The median of the rounds counts,
// rounded as the report shows it.
func TestVerdicts(t *testing.T) {
	large := load{size: 1280, pairs: 8, burst: 1}.name()
	batch := load{size: 1280, pairs: 8, burst: 8}.name()
	small := load{size: 64, pairs: 8, burst: 1}.name()
	calm := load{size: 1280, pairs: 8, burst: 1, rate: 10_000}.name()
	for _, c := range []struct {
		measurement     string
		metric          metric
		reached, missed float64
		wanted          string
	}{
		{large, cpuPerPacket, 0.364, 0.366, "at most 0.36"},
		{batch, cpuPerPacket, 0.36, 0.37, "at most 0.36"},
		{small, cpuPerPacket, 0.80, 0.81, "at most 0.80"},
		{large, packetRate, 2.796, 2.794, "at least 2.80"},
		{calm, cpuPerPacket, 0.75, 0.76, "at most 0.75"},
		{connectName, cpuPerConnect, 1.02, 1.03, "at most 1.02"},
		{idleName(10_000), memoryPerClient, 1.03, 1.04, "at most 1.03"},
		{stunName(1), answersPer, 1.5, 1.49, "at least 1.50"},
		{startName, startDERP, 1.15, 1.16, "at most 1.15"},
	} {
		for ratio, want := range map[float64]bool{c.reached: true, c.missed: false} {
			v := judged(t, c.measurement, c.metric, []float64{100}, []float64{100 * ratio})
			if v.Reached != want || v.Wanted != c.wanted {
				t.Errorf("%s, %s: %+v, want %q reached %t", c.measurement, c.metric, v, c.wanted, want)
			}
		}
	}
	for _, c := range []struct {
		what          string
		derper, derpd []float64
		reached       bool
	}{
		{"the median counts", []float64{10, 10, 10}, []float64{9, 3, 3}, true},
		{"the median of the ratios, not of the values", []float64{10, 20, 40}, []float64{5, 9, 10}, false},
	} {
		if v := judged(t, large, cpuPerPacket, c.derper, c.derpd); v.Reached != c.reached {
			t.Errorf("%s: %+v", c.what, v)
		}
	}
	// Bursts of STUN requests have no limit.
	for _, ratio := range []float64{0.01, 100} {
		if v := judged(t, stunName(stunBurst), answersPer, []float64{1}, []float64{ratio}); !v.Reached || v.Wanted != "as measured" {
			t.Errorf("STUN, ratio %v: %+v", ratio, v)
		}
	}
}

// judged returns the verdict on the values of one metric, and checks that missed
// counts it.
func judged(t *testing.T, measurement string, m metric, derperValues, derpdValues []float64) verdict {
	t.Helper()
	r := &report{Rounds: len(derperValues)}
	for i := range derperValues {
		r.add(measurement, testrelay.Derper, sample{m: derperValues[i]})
		r.add(measurement, testrelay.Derpd, sample{m: derpdValues[i]})
	}
	r.conclude()
	if len(r.Targets) != 1 {
		t.Fatalf("%s, %s: %d verdicts, want 1", measurement, m, len(r.Targets))
	}
	if v := r.Targets[0]; (r.missed() == 0) != v.Reached || r.missed() > 1 {
		t.Errorf("missed is %d: %+v", r.missed(), v)
	}
	return r.Targets[0]
}

func TestBetter(t *testing.T) {
	for _, c := range []struct {
		metric      metric
		ratio, want float64
	}{
		{packetRate, 2, 2},
		{arrivedRate, 2, 2},
		{connectRate, 0.5, 0.5},
		{answerRate, 3, 3},
		{answersPer, 4, 4},
		{cpuPerPacket, 0.25, 4},
		{memoryPerClient, 2, 0.5},
		{startDERP, 0, 0},
	} {
		if got := (verdict{target: target{metric: c.metric}}).better(c.ratio); got != c.want {
			t.Errorf("%s, ratio %v: %v times as good, want %v", c.metric, c.ratio, got, c.want)
		}
	}
}

func TestNotes(t *testing.T) {
	packets := load{size: 64, pairs: 8, burst: 1}.name()
	calm := load{size: 64, pairs: 8, burst: 1, rate: 10}.name()
	full := sample{packetRate: 1, serverBusy: 0.95, loadBusy: 0.8, othersBusy: 0.1}
	for _, c := range []struct {
		name   string
		sample sample // of derpd
		want   string // begins the only note; empty is none
	}{
		{packets, full, ""},
		{packets, sample{packetRate: 1, serverBusy: 0.9, loadBusy: 0.89}, ""},
		{packets, sample{packetRate: 1, serverBusy: 0.89, loadBusy: 0.5}, packets + ": derpd used 89% of its CPUs, the load 50%: the load may have limited the rate"},
		{packets, sample{packetRate: 1, serverBusy: 0.95, loadBusy: 0.9}, packets + ": derpd used 95% of its CPUs, the load 90%: the load may have limited the rate"},
		{connectName, sample{connectRate: 1, serverBusy: 0.5, loadBusy: 0.99}, "connect: derpd used 50% of its CPUs, the load 99%"},
		{stunName(stunBurst), sample{answerRate: 1, serverBusy: 0.85}, "STUN, 16 clients at once: derpd used 85% of its CPUs: the load limited the rate"},
		{stunName(stunBurst), sample{answerRate: 1, serverBusy: 0.95}, ""},
		// These loads leave a server room.
		{stunName(1), sample{answerRate: 1, serverBusy: 0.5, loadBusy: 0.5}, ""},
		{calm, sample{cpuPerPacket: 1, serverBusy: 0.2, loadBusy: 0.2}, ""},
		{stunName(1), sample{answerRate: 1, lostPackets: 3}, "STUN, one at a time: derpd lost up to 3 packets in a round"},
		{packets, sample{packetRate: 1, othersBusy: 0.11}, "other processes used up to 11% of the CPUs"},
	} {
		r := &report{Rounds: 5, Pinned: true}
		r.add(c.name, testrelay.Derpd, c.sample)
		r.conclude()
		if got := strings.Join(r.Notes, "\n"); !strings.HasPrefix(got, c.want) || (got == "") != (c.want == "") || len(r.Notes) > 1 {
			t.Errorf("%s, %v: notes %q, want %q", c.name, c.sample, got, c.want)
		}
	}
	for _, c := range []struct {
		report report
		want   string
	}{
		{report{Rounds: 4, Pinned: true}, "4 rounds are too few for a reliable spread; use --rounds 5 or more"},
		{report{Rounds: 5}, "servers and load shared all CPUs"},
		{report{Rounds: 5, Pinned: true, Congestion: "cubic"}, "network namespaces may use cubic; for others, set sysctl net.ipv4.tcp_allowed_congestion_control"},
	} {
		c.report.conclude()
		if len(c.report.Notes) != 1 || !strings.HasPrefix(c.report.Notes[0], c.want) {
			t.Errorf("notes %q, want %q", c.report.Notes, c.want)
		}
	}
}

// The results of a measurement are in the order of metrics. Metrics about the
// measurement itself come last and have no ratio.
func TestConclude(t *testing.T) {
	r := &report{Rounds: 1}
	for _, server := range []string{testrelay.Derper, testrelay.Derpd} {
		r.add("b", server, sample{lostPackets: 1, serverBusy: 1, delayP99: 1, packetRate: 2})
		r.add("a", server, sample{packetRate: 1})
	}
	r.conclude()
	var got []string
	for _, found := range r.Results {
		name := found.Measurement + " " + string(found.Metric)
		if found.Ratio != nil {
			name += " " + found.Ratio.String()
		}
		got = append(got, name)
	}
	want := []string{
		"b packets/s 1.00 (1.00–1.00)", "b p99 latency, ms 1.00 (1.00–1.00)", "b share of the server's CPUs in use", "b packets lost",
		"a packets/s 1.00 (1.00–1.00)",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// The values in testdata are invented.
func TestReport(t *testing.T) {
	r, err := readReport("testdata/report.json")
	if err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	if err := r.writeTable(&table); err != nil {
		t.Fatal(err)
	}
	golden(t, "testdata/table.txt", table.String())
	golden(t, "testdata/picture.svg", string(r.picture()))
	golden(t, "testdata/docs.en.md", r.docs(0))
	golden(t, "testdata/docs.zh.md", r.docs(1))

	again := filepath.Join(t.TempDir(), "again.json")
	if err := r.writeJSON(again); err != nil {
		t.Fatal(err)
	}
	copied, err := readReport(again)
	if err != nil || string(copied.picture()) != string(r.picture()) {
		t.Errorf("the copy differs: %v", err)
	}

	decoder := xml.NewDecoder(strings.NewReader(string(r.picture())))
	for {
		if _, err := decoder.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the picture is not XML: %v", err)
		}
	}
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil || string(want) != got {
		t.Errorf("%s: %v; got\n%s\nwant\n%s", path, err, got, want)
	}
}

// The READMEs and the picture agree with docker/bench.json, and have the marks that
// `make bench-docs` needs.
func TestDocs(t *testing.T) {
	root := filepath.Join("..", "..")
	r, err := readReport(filepath.Join(root, "docker", "bench.json"))
	if errors.Is(err, fs.ErrNotExist) {
		if r, err = readReport("testdata/report.json"); err != nil {
			t.Fatal(err)
		}
		for i, l := range languages {
			if _, err := r.withDocs(contents(t, filepath.Join(root, l.file)), i); err != nil {
				t.Errorf("%s: %v", l.file, err)
			}
		}
		return
	} else if err != nil {
		t.Fatal(err)
	}
	for i, l := range languages {
		old := contents(t, filepath.Join(root, l.file))
		if want, err := r.withDocs(old, i); err != nil || want != old {
			t.Errorf("%s differs from docker/bench.json; run: go run ./cmd/bench --from docker/bench.json --docs (%v)", l.file, err)
		}
	}
	if contents(t, filepath.Join(root, pictureFile)) != string(r.picture()) {
		t.Errorf("%s differs from docker/bench.json", pictureFile)
	}
}

func contents(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
