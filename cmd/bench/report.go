//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"

	"derpd/internal/testrelay"
)

// report contains all measured values, and the targets and notes computed from them.
type report struct {
	Date       time.Time `json:"date"`
	Go         string    `json:"go"`
	Platform   string    `json:"platform"`
	Rounds     int       `json:"rounds"`
	ServerCPUs int       `json:"server_cpus,omitempty"` // 0 is all
	Pinned     bool      `json:"pinned"`
	Congestion string    `json:"congestion,omitempty"` // congestion controls that could be measured, with --path only
	Results    []*result `json:"results"`
	Targets    []verdict `json:"targets,omitempty"`
	Notes      []string  `json:"notes,omitempty"`
}

// result is one metric of one measurement, round by round.
type result struct {
	Measurement string    `json:"measurement"`
	Metric      metric    `json:"metric"`
	Derper      []float64 `json:"derper"`
	Derpd       []float64 `json:"derpd"`
	// Ratio is the spread of derpd's value divided by derper's. It is nil if no
	// round has a ratio, or if the metric is about the measurement itself.
	Ratio *spread `json:"ratio,omitempty"`
}

// of returns the values of one server.
func (r *result) of(server string) []float64 {
	if r == nil {
		return nil
	}
	if server == testrelay.Derper {
		return r.Derper
	}
	return r.Derpd
}

// find returns the values of a metric; nil if it was not measured.
func (r *report) find(measurement string, m metric) *result {
	for _, found := range r.Results {
		if found.Measurement == measurement && found.Metric == m {
			return found
		}
	}
	return nil
}

// add appends the values of one measurement of one server.
func (r *report) add(measurement, server string, s sample) {
	for m, value := range s {
		found := r.find(measurement, m)
		if found == nil {
			found = &result{Measurement: measurement, Metric: m}
			r.Results = append(r.Results, found)
		}
		if server == testrelay.Derper {
			found.Derper = append(found.Derper, value)
		} else {
			found.Derpd = append(found.Derpd, value)
		}
	}
}

// conclude computes ratios, targets and notes from the values. It sorts the results
// of each measurement by the order of metrics.
func (r *report) conclude() {
	var order []string
	for _, found := range r.Results {
		if !slices.Contains(order, found.Measurement) {
			order = append(order, found.Measurement)
		}
		found.Ratio = nil
		if list := ratios(found.Derpd, found.Derper); isCompared(found.Metric) && len(list) > 0 {
			ratio := spreadOf(list)
			found.Ratio = &ratio
		}
	}
	slices.SortStableFunc(r.Results, func(a, b *result) int {
		if a.Measurement != b.Measurement {
			return slices.Index(order, a.Measurement) - slices.Index(order, b.Measurement)
		}
		return rank(a.Metric) - rank(b.Metric)
	})
	r.Targets = verdicts(r)
	r.Notes = notes(r)
}

// enough is a share of CPUs. A server was at its limit if it used a larger share of
// its CPUs, and the load a smaller share.
const enough = 0.9

// quiet is the share of the machine that other processes may use without a note.
const quiet = 0.1

// notes returns the reasons why values are less reliable.
func notes(r *report) []string {
	var list []string
	add := func(format string, args ...any) { list = append(list, fmt.Sprintf(format, args...)) }
	others := 0.0
	for _, found := range r.Results {
		load := r.find(found.Measurement, loadBusy)
		for _, name := range []string{testrelay.Derper, testrelay.Derpd} {
			values := found.of(name)
			if len(values) == 0 {
				continue
			}
			s := spreadOf(values)
			switch {
			case found.Metric == othersBusy:
				others = max(others, s.Median)
			case found.Metric == lostPackets && s.Max > 0:
				add("%s: %s lost up to %.0f packets in a round", found.Measurement, name, s.Max)
			case found.Metric == serverBusy && saturates(r, found.Measurement):
				loaded := load.of(name)
				switch {
				case loaded == nil && s.Median < enough:
					add("%s: %s used %.0f%% of its CPUs: the load limited the rate", found.Measurement, name, s.Median*100)
				case loaded != nil && (s.Median < enough || spreadOf(loaded).Median >= enough):
					add("%s: %s used %.0f%% of its CPUs, the load %.0f%%: the load may have limited the rate",
						found.Measurement, name, s.Median*100, spreadOf(loaded).Median*100)
				}
			}
		}
	}
	if others > quiet {
		add("other processes used up to %.0f%% of the CPUs: rates and latencies are unreliable; use a quiet machine, or chrt --rr 1 make bench", others*100)
	}
	if r.Rounds < 5 {
		add("%d rounds are too few for a reliable spread; use --rounds 5 or more", r.Rounds)
	}
	if r.Congestion != "" {
		add("network namespaces may use %s; for others, set sysctl net.ipv4.tcp_allowed_congestion_control", r.Congestion)
	}
	if !r.Pinned {
		add("servers and load shared all CPUs: rates depend on both; use a machine with two CPUs or more")
	}
	return list
}

// saturates reports whether the load of a measurement is meant to reach the
// server's limit.
func saturates(r *report, measurement string) bool {
	return r.find(measurement, packetRate) != nil || measurement == connectName || measurement == stunName(stunBurst)
}

// missed returns the number of targets that are not reached.
func (r *report) missed() int {
	n := 0
	for _, v := range r.Targets {
		if !v.Reached {
			n++
		}
	}
	return n
}

func (r *report) writeTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	print := func(format string, args ...any) { _, _ = fmt.Fprintf(t, format, args...) }
	print("%s, %s, %s, %d rounds", r.Date.Format(time.DateOnly), r.Go, r.Platform, r.Rounds)
	if r.Pinned && r.ServerCPUs > 0 {
		print(", servers on %d of the CPUs, the load on the others", r.ServerCPUs)
	}
	print("\nmedians, and the ratio derpd / derper (lowest and highest of all rounds)\n")
	last := ""
	for _, found := range r.Results {
		if len(found.Derper) == 0 || len(found.Derpd) == 0 {
			continue
		}
		if found.Measurement != last {
			print("\n%s\tderper\tderpd\tratio\n", found.Measurement)
			last = found.Measurement
		}
		ratio := ""
		if found.Ratio != nil {
			ratio = found.Ratio.String()
		}
		print("  %s\t%s\t%s\t%s\n", found.Metric, number(spreadOf(found.Derper).Median), number(spreadOf(found.Derpd).Median), ratio)
	}
	if len(r.Targets) > 0 {
		print("\ntargets\tratio\tlimit\t\n")
	}
	for _, v := range r.Targets {
		reached := "reached"
		if !v.Reached {
			reached = "not reached"
		}
		print("  %s\t%s\t%s\t%s\n", v.What, v.Ratio, v.Wanted, reached)
	}
	if len(r.Notes) > 0 {
		print("\n")
	}
	for _, note := range r.Notes {
		print("note: %s\n", note)
	}
	return t.Flush()
}

func (s spread) String() string {
	return fmt.Sprintf("%.2f (%.2f–%.2f)", s.Median, s.Min, s.Max)
}

// number formats x with three significant digits, and a comma between thousands.
func number(x float64) string {
	if x == 0 {
		return "0"
	}
	place := func() int { return 2 - int(math.Floor(math.Log10(math.Abs(x)))) }
	scale := math.Pow(10, float64(place()))
	x = math.Round(x*scale) / scale
	text := strconv.FormatFloat(x, 'f', max(0, place()), 64)
	if place() > 0 {
		return text
	}
	for at := len(text) - 3; at > 0 && text[at-1] != '-'; at -= 3 {
		text = text[:at] + "," + text[at:]
	}
	return text
}

func (r *report) writeJSON(path string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

// readReport reads a file of writeJSON. It computes targets and notes again, because
// their rules may have changed.
func readReport(path string) (*report, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var r report
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	r.conclude()
	return &r, nil
}
