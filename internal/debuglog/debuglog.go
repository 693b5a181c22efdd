// Package debuglog logs the lines of libraries that use the standard library's
// logger. Nearly all these lines are about single clients, with their addresses.
package debuglog

import (
	"bytes"
	"io"

	"github.com/rs/zerolog"
)

// Writer returns a writer that logs each write as one line at debug level, with the
// name of the component.
func Writer(log zerolog.Logger, component string) io.Writer {
	return writer{log.With().Str("component", component).Logger()}
}

type writer struct{ log zerolog.Logger }

// Write implements [io.Writer].
func (w writer) Write(p []byte) (int, error) {
	w.log.Debug().Msg(string(bytes.TrimRight(p, "\n")))
	return len(p), nil
}
