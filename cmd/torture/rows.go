//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"derpd/internal/testrelay"
)

// row is one attack and what derpd promises under it. Each row is a file, which
// registers the row.
type row struct {
	name   string // that --only matches
	attack string // one line for people
	// short rows are part of --short. [lab.short] tells a row to make its attack
	// smaller.
	short bool
	// upstream rows attack derper too. Rows about what derper does not have, or does
	// not survive, leave it out.
	upstream bool
	// light rows use little CPU, and measure nothing that other rows disturb. They run
	// beside each other.
	light bool
	// timed rows measure times or losses. In their short form a broken promise is
	// attacked once more: some seconds may meet a busy moment of the machine.
	timed bool
	// limit is the longest time of one server; 0 is [usualLimit].
	limit time.Duration
	// run attacks one server, which [lab.server] names. It returns the same lines for
	// both servers. The error is that of the row itself, or [notRun].
	run func(ctx context.Context, l *lab) ([]measured, error)
}

const usualLimit = 5 * time.Minute

var registered []row

// register adds a row. The init function of each row's file calls it.
func register(r row) { registered = append(registered, r) }

// notRun is the reason why this machine cannot run a row.
type notRun string

func (n notRun) Error() string { return string(n) }

// state is the judgement of one line.
type state string

const (
	kept       state = "ok"
	broken     state = "FAILED"
	notReached state = "NOT REACHED" // the attack was too weak, or the machine too busy, to show anything
	noted      state = ""            // nothing is promised
)

// measured is one line of a row.
type measured struct {
	What  string `json:"what"` // is promised, or was measured
	Value string `json:"value"`
	State state  `json:"state,omitempty"`
}

// promise is a line with a promise.
func promise(what string, isKept bool, format string, args ...any) measured {
	m := measured{What: what, Value: fmt.Sprintf(format, args...), State: broken}
	if isKept {
		m.State = kept
	}
	return m
}

// note is a line without a promise.
func note(what, format string, args ...any) measured {
	return measured{What: what, Value: fmt.Sprintf(format, args...)}
}

// strength is the line of the attack itself. A machine that reaches less than half of
// what is wanted is too slow, and its row is no proof.
func strength(what string, got, wanted float64, unit string) measured {
	m := note(what, "%.0f of %.0f%s", got, wanted, unit)
	if got < wanted/2 {
		m.State = notReached
	}
	return m
}

// outcome is the result of a row on one server, as its process prints it.
type outcome struct {
	Lines  []measured `json:"lines,omitempty"`
	NotRun string     `json:"notRun,omitempty"` // reason
	Error  string     `json:"error,omitempty"`
}

// outcomeOf returns the outcome of a call of run.
func outcomeOf(lines []measured, err error) outcome {
	o := outcome{Lines: lines}
	if reason, ok := errors.AsType[notRun](err); ok {
		o.NotRun = string(reason)
	} else if err != nil {
		o.Error = err.Error()
	}
	return o
}

// result is a row with its outcome on each server.
type result struct {
	row
	derpd, derper outcome // derper's may be empty
	took          time.Duration
}

// Verdicts of a whole row besides those of a line.
const didNotRun state = "NOT RUN"

// verdict judges derpd alone.
func (r result) verdict() state {
	states := []state{}
	for _, line := range r.derpd.Lines {
		states = append(states, line.State)
	}
	switch {
	case r.derpd.Error != "" || slices.Contains(states, broken):
		return broken
	case r.derpd.NotRun != "":
		return didNotRun
	case slices.Contains(states, notReached):
		return notReached
	}
	return kept
}

// derpers returns derper's value of a line, or nothing.
func (r result) derpers(what string) string {
	for _, line := range r.derper.Lines {
		if line.What == what {
			return line.Value
		}
	}
	return cmp.Or(firstLine(r.derper.Error), firstLine(r.derper.NotRun))
}

// write prints the row: each promise, what was measured, and derper's value.
func (r result) write(w io.Writer) error {
	print := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) }
	print("\n%s: %s\n", r.name, r.attack)
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if len(r.derpd.Lines) > 0 {
		_, _ = fmt.Fprintf(table, "  promise\t%s\t%s\t\n", testrelay.Derpd, testrelay.Derper)
	}
	for _, line := range r.derpd.Lines {
		_, _ = fmt.Fprintf(table, "  %s\t%s\t%s\t%s\n", line.What, line.Value, cmp.Or(r.derpers(line.What), "-"), line.State)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, text := range []string{r.derpd.NotRun, r.derpd.Error} {
		if text != "" {
			print("  %s\n", text)
		}
	}
	if text := cmp.Or(r.derper.Error, r.derper.NotRun); text != "" {
		print("  %s: %s\n", testrelay.Derper, text)
	}
	_, err := fmt.Fprintf(w, "  %s, %.0f s\n", r.verdict(), r.took.Seconds())
	return err
}

// summary prints all promises as one table in Markdown.
func summary(w io.Writer, results []result) {
	cell := func(text string) string { return strings.ReplaceAll(cmp.Or(text, "-"), "|", `\|`) }
	_, _ = fmt.Fprintf(w, "\n| attack | promise | %s | %s | |\n|---|---|---|---|---|\n", testrelay.Derpd, testrelay.Derper)
	for _, r := range results {
		lines := r.derpd.Lines
		if text := cmp.Or(r.derpd.Error, r.derpd.NotRun); text != "" {
			lines = append(slices.Clip(lines), measured{Value: firstLine(text), State: r.verdict()})
		}
		for i, line := range lines {
			name := ""
			if i == 0 {
				name = r.name + ": " + r.attack
			}
			_, _ = fmt.Fprintf(w, "| %s | %s | %s | %s | %s |\n", name, cell(line.What), cell(line.Value), cell(r.derpers(line.What)), line.State)
		}
	}
}

// conclude prints all rows, and how many have each verdict. It returns an error if a
// promise is broken.
func conclude(w io.Writer, results []result) error {
	summary(w, results)
	count := map[state]int{}
	var failed []string
	for _, r := range results {
		v := r.verdict()
		count[v]++
		if v == broken {
			failed = append(failed, r.name)
		}
	}
	_, err := fmt.Fprintf(w, "\n%d attacks: %d ok, %d FAILED, %d NOT REACHED, %d NOT RUN\n", len(results),
		count[kept], count[broken], count[notReached], count[didNotRun])
	if len(failed) > 0 {
		return fmt.Errorf("promises are broken: %q", failed)
	}
	return err
}

// selection returns the rows that the options ask for.
func selection(o options) []row {
	var chosen []row
	for _, r := range registered {
		if (o.only == nil || o.only.MatchString(r.name)) && (r.short || !o.short) {
			chosen = append(chosen, r)
		}
	}
	return chosen
}

func list(w io.Writer, rows []row) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		length := ""
		if r.short {
			length = "short"
		}
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\n", r.name, length, r.attack)
	}
	return table.Flush()
}
