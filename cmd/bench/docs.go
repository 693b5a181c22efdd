//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"html"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	pictureFile = "docker/bench.svg"
	docsBegin   = "<!-- made by: make bench-docs -->\n"
	docsEnd     = "<!-- end -->\n"
)

// languages are the READMEs with the words of their tables.
var languages = []struct {
	file, header, caption string
	label                 func(target) string
}{
	{
		"README.md", "| | derper | derpd | ratio |",
		"%s, %s, %d rounds in turns: medians, and the ratio derpd / derper (lowest–highest). In the picture, longer is better.",
		func(t target) string { return t.en },
	},
	{
		"README.zh-CN.md", "| | derper | derpd | 比值 |",
		"%s，%s，交替测量 %d 轮：中位数，以及 derpd 与 derper 的比值（最小到最大）。图中越长越好。",
		func(t target) string { return t.zh },
	},
}

// writeDocs writes the picture, and the tables in the READMEs.
func (r *report) writeDocs(root string) error {
	if len(r.Targets) == 0 {
		return errors.New("no target was measured, so the documents have no table")
	}
	if err := os.WriteFile(filepath.Join(root, pictureFile), r.picture(), 0o644); err != nil {
		return err
	}
	for i, l := range languages {
		path := filepath.Join(root, l.file)
		old, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		text, err := r.withDocs(string(old), i)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// withDocs replaces the table between the marks in a README.
func (r *report) withDocs(old string, language int) (string, error) {
	before, rest, found := strings.Cut(old, docsBegin)
	_, after, closed := strings.Cut(rest, docsEnd)
	if !found || !closed {
		return "", fmt.Errorf("no place for the table; add the lines %q and %q", docsBegin, docsEnd)
	}
	return before + docsBegin + r.docs(language) + docsEnd + after, nil
}

// docs returns the table in a language.
func (r *report) docs(language int) string {
	l := languages[language]
	var b strings.Builder
	fmt.Fprintf(&b, "![derpd / derper](%s)\n\n", pictureFile)
	fmt.Fprintf(&b, l.caption+"\n\n", r.Date.Format(time.DateOnly), r.Platform, r.Rounds)
	fmt.Fprintf(&b, "%s\n|---|---|---|---|\n", l.header)
	for _, v := range r.Targets {
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", l.label(v.target), withUnit(v.derper, v.target.unit), withUnit(v.derpd, v.target.unit), v.Ratio)
	}
	return b.String()
}

func withUnit(x float64, unit string) string {
	if unit == "/s" {
		return number(x)
	}
	return number(x) + " " + unit
}

// Sizes in the picture, in its own units.
const (
	pictureWidth = 760
	labelWidth   = 310
	rowHeight    = 24
	barHeight    = 14
	barsWidth    = 360
	topMargin    = 44
	oneTick      = 1.0 // derper itself
)

// picture draws a bar for each target: how many times as good as derper derpd is.
// The picture has no background. Its colours are readable on light and dark pages.
func (r *report) picture() []byte {
	longest := 1.25
	for _, v := range r.Targets {
		longest = max(longest, v.better(v.Ratio.Median), v.better(v.Ratio.Min), v.better(v.Ratio.Max))
	}
	x := func(value float64) float64 { return labelWidth + value/longest*barsWidth }

	var b bytes.Buffer
	height := topMargin + len(r.Targets)*rowHeight + 8
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%[1]d" height="%[2]d" role="img" font-family="system-ui, sans-serif" font-size="13">
<title>derpd against derper</title>
<style>
text { fill: #24292f } .bar { fill: #2f81f7 } .less { fill: #bc4c00 } .line, .spread { stroke: #57606a }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .less { fill: #f0883e } .line, .spread { stroke: #b1bac4 } }
</style>
<text x="%d" y="18" font-weight="600">derpd against derper: how many times as good</text>
`, pictureWidth, height, 8)
	fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="middle">derper = 1</text>`+"\n", x(oneTick), topMargin-8)
	for i, v := range r.Targets {
		top := topMargin + i*rowHeight
		middle := top + rowHeight/2
		class := "bar"
		if v.better(v.Ratio.Median) < oneTick && !v.Reached {
			class = "less"
		}
		low, high := v.better(v.Ratio.Min), v.better(v.Ratio.Max)
		low, high = min(low, high), max(low, high)
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>`, labelWidth-8, middle+4, html.EscapeString(v.target.en))
		fmt.Fprintf(&b, `<rect class="%s" x="%d" y="%d" width="%.1f" height="%d" rx="2"/>`, class, labelWidth, middle-barHeight/2, x(v.better(v.Ratio.Median))-labelWidth, barHeight)
		fmt.Fprintf(&b, `<path class="spread" d="M%.1f %dH%.1f"/>`, x(low), middle, x(high))
		fmt.Fprintf(&b, `<text x="%.1f" y="%d">%.2f×</text>`+"\n", x(max(high, oneTick))+8, middle+4, v.better(v.Ratio.Median))
	}
	fmt.Fprintf(&b, `<path class="line" stroke-dasharray="4 3" d="M%.1f %dV%d"/>`+"\n</svg>\n", x(oneTick), topMargin-2, height-6)
	return b.Bytes()
}
