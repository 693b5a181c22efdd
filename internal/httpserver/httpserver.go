// Package httpserver creates every HTTP server of the program, all with the same
// limits.
package httpserver

import (
	stdlog "log"
	"net/http"
	"time"

	"github.com/rs/zerolog"

	"derpd/internal/debuglog"
)

const (
	// requestTimeout limits the TLS handshake, the request and the response. A
	// hijacked connection has no deadline.
	requestTimeout = 30 * time.Second

	// maxHeaderBytes is far above the header of a DERP client.
	maxHeaderBytes = 16 << 10
)

// New returns an HTTP/1.1 server. HTTP/2 is off because DERP hijacks the
// connection. Failed handshakes, with the addresses of clients, are logged at
// debug level.
func New(handler http.Handler, log zerolog.Logger) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &http.Server{
		Handler:        handler,
		Protocols:      protocols,
		ReadTimeout:    requestTimeout,
		WriteTimeout:   requestTimeout,
		MaxHeaderBytes: maxHeaderBytes,
		ErrorLog:       stdlog.New(debuglog.Writer(log, "http"), "", 0),
	}
}
