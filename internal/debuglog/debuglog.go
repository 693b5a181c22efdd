// Package debuglog logs the lines of libraries that use the standard library's
// logger. Nearly all these lines are about single clients, with their addresses.
package debuglog

import (
	"io"
	"strings"

	"github.com/rs/zerolog"

	"derpd/internal/caught"
)

// Writer returns a writer that logs each write as one line at debug level, with the
// name of the component. A recovered panic is logged at error level instead, without
// the client's address; see [caught.Record].
func Writer(log zerolog.Logger, component string) io.Writer {
	return writer{log.With().Str("component", component).Logger()}
}

type writer struct{ log zerolog.Logger }

// panicked splits the line of net/http and of derpserver about a panic that they have
// recovered: the address of the client, the value and the stack.
func panicked(line string) (value, stack string, ok bool) {
	program, rest, _ := strings.Cut(line, ": panic serving ")
	if program != "http" && program != "derp" {
		return "", "", false
	}
	const goroutine = "\ngoroutine "
	_, rest, _ = strings.Cut(rest, ": ")
	value, stack, ok = strings.Cut(rest, goroutine)
	return value, goroutine[1:] + stack, ok
}

// Write implements [io.Writer].
func (w writer) Write(p []byte) (int, error) {
	line := strings.TrimRight(string(p), "\n")
	if value, stack, ok := panicked(line); ok {
		caught.Record(w.log, "connection", value, stack)
	} else {
		w.log.Debug().Msg(line)
	}
	return len(p), nil
}
