// Package debuglog takes the lines of libraries that log with the standard
// library. Nearly all of them are about single clients, and name their
// addresses.
package debuglog

import (
	"bytes"
	"io"

	"github.com/rs/zerolog"
)

// Writer logs each write as one line at debug level, under the name of a
// component.
func Writer(log zerolog.Logger, component string) io.Writer {
	return writer{log.With().Str("component", component).Logger()}
}

type writer struct{ log zerolog.Logger }

// Write implements [io.Writer].
func (w writer) Write(p []byte) (int, error) {
	w.log.Debug().Msg(string(bytes.TrimRight(p, "\n")))
	return len(p), nil
}
