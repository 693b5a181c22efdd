//go:build linux

package main

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// millis prints a time in milliseconds.
func millis(d time.Duration) string {
	ms := d.Seconds() * 1e3
	if ms < 10 {
		return fmt.Sprintf("%.1f ms", ms)
	}
	return fmt.Sprintf("%.0f ms", ms)
}

// firstLine returns the first line of a text, cut to the width of a table.
func firstLine(text string) string {
	const width = 40
	line, _, _ := strings.Cut(strings.TrimSpace(text), "\n")
	if len(line) > width {
		return line[:width] + "…"
	}
	return line
}

// rootCause prints the innermost error, without the addresses around it.
func rootCause(err error) string {
	for inner := err; inner != nil; inner = errors.Unwrap(inner) {
		err = inner
	}
	return firstLine(err.Error())
}

// megabytes prints a difference of memory.
func megabytes(bytes int64) string { return fmt.Sprintf("%+.1f MB", float64(bytes)/(1<<20)) }
