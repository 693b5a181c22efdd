package httpserver_test

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"derpd/internal/httpserver"
)

// pipes is a listener whose connections are pipes.
type pipes struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), closed: make(chan struct{})} }

func (l *pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipes) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipes) Addr() net.Addr { return &net.TCPAddr{} }

func (l *pipes) dial() net.Conn {
	near, far := net.Pipe()
	l.conns <- far
	return near
}

// serve starts a server until the test ends.
func serve(t *testing.T, server *http.Server) *pipes {
	t.Helper()
	l := newPipes()
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	t.Cleanup(func() {
		_ = server.Close()
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("the server ended with %v", err)
		}
	})
	return l
}

// create are the functions of the package.
var create = map[string]func(http.Handler, zerolog.Logger) *http.Server{"New": httpserver.New, "Public": httpserver.Public}

// A connection without a whole request, a response that nobody reads, and an idle
// connection end.
func TestTimeouts(t *testing.T) {
	for _, tt := range []struct {
		name, request   string
		ofNew, ofPublic time.Duration
	}{
		{"no request", "", 30 * time.Second, 5 * time.Second},
		{"half a request", "GET / HTTP/1.1\r\nHost: x\r\n", 30 * time.Second, 5 * time.Second},
		{"half a body", "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab", 30 * time.Second, 5 * time.Second},
		{"unread response", "GET /large HTTP/1.1\r\nHost: x\r\n\r\n", 30 * time.Second, 10 * time.Second},
		{"idle", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", 30 * time.Second, 3 * time.Second},
	} {
		for of, want := range map[string]time.Duration{"New": tt.ofNew, "Public": tt.ofPublic} {
			t.Run(tt.name+" of "+of, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					// net/http waits before it closes a connection.
					t.Cleanup(func() { <-time.After(time.Second) })
					failed := make(chan time.Duration, 1)
					begun := time.Now()
					l := serve(t, create[of](http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						var err error
						if r.URL.Path == "/large" {
							_, err = w.Write(make([]byte, 1<<20))
						} else {
							_, err = io.ReadAll(r.Body)
						}
						if err != nil {
							failed <- time.Since(begun)
						}
					}), zerolog.Nop()))
					conn := l.dial()
					defer func() { _ = conn.Close() }()
					if _, err := io.WriteString(conn, tt.request); err != nil {
						t.Fatal(err)
					}
					var took time.Duration
					if tt.name == "half a body" || tt.name == "unread response" {
						took = <-failed
					} else {
						_, _ = io.ReadAll(conn)
						took = time.Since(begun)
					}
					if took != want {
						t.Errorf("ended after %v, want %v", took, want)
					}
				})
			})
		}
	}
}

// Headers up to the limit are accepted, longer ones refused.
func TestHeaderLimit(t *testing.T) {
	const ok, refused = http.StatusOK, http.StatusRequestHeaderFieldsTooLarge
	for of, statuses := range map[string]map[int]int{
		"New":    {8 << 10: ok, 15 << 10: ok, 24 << 10: refused},
		"Public": {8000: ok, 8300: refused, 15 << 10: refused},
	} {
		l := serve(t, create[of](http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), zerolog.Nop()))
		for length, want := range statuses {
			conn := l.dial()
			go func() {
				_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("x", length)+"\r\n\r\n")
			}()
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			_ = res.Body.Close()
			_ = conn.Close()
			if res.StatusCode != want {
				t.Errorf("%s: a header of %d bytes: %d, want %d", of, length, res.StatusCode, want)
			}
		}
	}
}

// The protocol is HTTP/1.1 alone: a hijacked connection exists only there.
func TestProtocols(t *testing.T) {
	for of, server := range create {
		p := server(http.NotFoundHandler(), zerolog.Nop()).Protocols
		if !p.HTTP1() || p.HTTP2() || p.UnencryptedHTTP2() {
			t.Errorf("%s: protocols %v, want HTTP/1 alone", of, p)
		}
	}
}

// Errors of connections are logged at debug level, one line each.
func TestErrorLog(t *testing.T) {
	var log bytes.Buffer
	server := httpserver.New(http.NotFoundHandler(), zerolog.New(&log))
	server.ErrorLog.Print("TLS handshake error from 192.0.2.7:1")
	if got, want := log.String(), `{"level":"debug","component":"http","message":"TLS handshake error from 192.0.2.7:1"}`+"\n"; got != want {
		t.Errorf("logged %s, want %s", got, want)
	}
}
