// Package debuglog logs the lines of libraries that use the standard library's
// logger. Nearly all these lines are about single clients, with their addresses.
package debuglog

import (
	"bytes"
	"io"
	"regexp"

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

// panicked matches the line of net/http and of derpserver about a panic that they have
// recovered: the address of the client, the value and the stack.
var panicked = regexp.MustCompile(`(?s)^(?:http|derp): panic serving [^ ]*: (.*?)\n(goroutine .*)$`)

// Write implements [io.Writer].
func (w writer) Write(p []byte) (int, error) {
	if found := panicked.FindSubmatch(p); found != nil {
		caught.Record(w.log, "connection", string(found[1]), string(found[2]))
		return len(p), nil
	}
	w.log.Debug().Msg(string(bytes.TrimRight(p, "\n")))
	return len(p), nil
}
