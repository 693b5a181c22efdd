package relay

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"

	"derpd/internal/caught"
	"derpd/internal/debuglog"
	"derpd/internal/testkit"
)

// A panic in a handler, or while derpserver serves a client, ends that connection
// alone. The log has the stack and no address.
func TestPanicEndsOneConnection(t *testing.T) {
	var out testkit.Buffer
	logger := zerolog.New(&out).Level(zerolog.InfoLevel)
	log.SetOutput(debuglog.Writer(logger, "stdlog"))
	t.Cleanup(func() { log.SetOutput(io.Discard) })
	flags := log.Flags()
	log.SetFlags(0)
	t.Cleanup(func() { log.SetFlags(flags) })

	cert, getCertificate := certificate(t)
	poison := key.NewNode()
	ln := listen(t)
	r := start(t, Config{
		GetCertificate: getCertificate, Log: logger, TellClients: true,
		Home: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("of the home page") }),
		Admit: func(_ context.Context, node key.NodePublic, _ netip.Addr) error {
			if node == poison.Public() {
				panic("of admission")
			}
			return nil
		},
	}, ln)
	a, b := connect(t, ln, cert, key.NewNode()), connect(t, ln, cert, key.NewNode())
	counted := func(what string, cause func()) {
		t.Helper()
		before := caught.Count()
		cause()
		testkit.Until(t, "the panic "+what+" is counted", func() bool { return caught.Count() > before })
		testkit.Exchange(t, a, b)
	}
	counted("of the home page", func() {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+ln.Addr().String()+"/", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		if res, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: testkit.Trust(testkit.Pool(cert)), DisableKeepAlives: true}}).Do(request); err == nil {
			_ = res.Body.Close()
			t.Error("the request was answered")
		}
	})
	text := out.String()
	if !strings.Contains(text, `"level":"error"`) || !strings.Contains(text, `"panic":"of the home page"`) || !strings.Contains(text, "panic_test.go") || strings.Contains(text, "127.0.0.1") {
		t.Errorf("want an error with the stack and no address, got %s", text)
	}
	counted("of admission", func() {
		if err := testkit.Admitted(t, client(t, ln, cert, poison)); err == nil {
			t.Error("the client is admitted")
		}
	})
	testkit.Until(t, "only the two clients are connected", func() bool {
		r.sessions.mu.Lock()
		defer r.sessions.mu.Unlock()
		return len(r.sessions.open) == 2
	})
}

// panicking is a connection whose Write panics.
type panicking struct{ net.Conn }

func (panicking) Write([]byte) (int, error) { panic("of a write") }

// derpserver writes on a goroutine of its own, which recovers no panic.
func TestPanicOfAWrite(t *testing.T) {
	near, far := net.Pipe()
	s := sessionOf(panicking{near}, nil)
	for range 2 {
		ended := make(chan error, 1)
		go func() {
			_, err := s.Write([]byte{6, 0, 0, 0, 0}) // a whole frame
			ended <- err
		}()
		if err := testkit.Receive(t, "the end of the write", ended); !errors.Is(err, errPanic) {
			t.Errorf("got %v", err)
		}
	}
	_ = far.SetReadDeadline(time.Now().Add(testkit.Patience))
	if _, err := far.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the connection is open: %v", err)
	}
}
