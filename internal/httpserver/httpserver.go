// Package httpserver creates every HTTP server of the program. Those of the public
// listeners have lower limits.
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

const (
	// publicTimeout limits the TLS handshake, and then the request. Every client
	// sends its handshake and its request at once.
	publicTimeout = 5 * time.Second

	// publicWriteTimeout limits a response. All responses are short.
	publicWriteTimeout = 10 * time.Second

	// publicIdleTimeout limits the wait for another request. Clients repeat their
	// probes at once.
	publicIdleTimeout = 3 * time.Second

	// publicHeaderBytes limits the header. net/http adds headerSlop to its limit.
	publicHeaderBytes, headerSlop = 8 << 10, 4 << 10
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

// Public is New for listeners that strangers reach.
func Public(handler http.Handler, log zerolog.Logger) *http.Server {
	s := New(handler, log)
	s.ReadTimeout, s.WriteTimeout, s.IdleTimeout = publicTimeout, publicWriteTimeout, publicIdleTimeout
	s.MaxHeaderBytes = publicHeaderBytes - headerSlop
	return s
}
