package relay

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/net/wsconn"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"derpd/internal/testkit"
)

// dialWebSocket returns a client over a WebSocket that may be refused.
func dialWebSocket(t *testing.T, ln net.Listener, config *tls.Config, private key.NodePrivate, app string) *derp.Client {
	t.Helper()
	scheme := "ws://"
	if config != nil {
		scheme = "wss://"
	}
	ws, res, err := websocket.Dial(t.Context(), scheme+ln.Addr().String()+"/derp", &websocket.DialOptions{
		HTTPClient: &http.Client{Transport: &http.Transport{TLSClientConfig: config}}, Subprotocols: []string{"derp"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if res.Body != nil {
		_ = res.Body.Close()
	}
	t.Cleanup(func() { _ = ws.CloseNow() })
	conn := wsconn.NetConn(context.Background(), ws, websocket.MessageBinary, "relay")
	c, err := derp.NewClient(private, conn, bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn)), logger.Discard, derp.AppName(app))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A refused client gets the reason as its first message, on every kind of
// connection. The connection then stays open until the relay is closed, relays
// nothing, and is no client.
func TestRefusedIsTold(t *testing.T) {
	cert, getCertificate := certificate(t)
	trust := testkit.Trust(testkit.Pool(cert))
	old := trust.Clone()
	old.MaxVersion = tls.VersionTLS12
	type receiver interface {
		Recv() (derp.ReceivedMessage, error)
		Send(key.NodePublic, []byte) error
	}
	native := func(cert *tls.Certificate, config *tls.Config) func(*testing.T, net.Listener, key.NodePrivate, string) receiver {
		return func(t *testing.T, ln net.Listener, private key.NodePrivate, app string) receiver {
			c := client(t, ln, cert, private)
			c.AppName = app
			if config != nil {
				c.TLSConfig = config
			}
			return c
		}
	}
	webSocket := func(config *tls.Config) func(*testing.T, net.Listener, key.NodePrivate, string) receiver {
		return func(t *testing.T, ln net.Listener, private key.NodePrivate, app string) receiver {
			return dialWebSocket(t, ln, config, private, app)
		}
	}
	for kind, tt := range map[string]struct {
		tls bool
		new func(*testing.T, net.Listener, key.NodePrivate, string) receiver
	}{
		"fast start":            {true, native(cert, nil)},
		"HTTP upgrade":          {true, native(cert, old)},
		"HTTP upgrade, no TLS":  {false, native(nil, nil)},
		"WebSocket":             {true, webSocket(trust)},
		"WebSocket without TLS": {false, webSocket(nil)},
	} {
		t.Run(kind, func(t *testing.T) {
			member, other, away, many := key.NewNode(), key.NewNode(), key.NewNode(), key.NewNode()
			c := Config{Log: zerolog.Nop(), TellClients: true, DisallowApps: []string{"unwanted"}}
			c.Admit = func(_ context.Context, node key.NodePublic, _ netip.Addr) error {
				switch node {
				case member.Public(), other.Public():
					return nil
				case away.Public():
					return fmt.Errorf("%w: no answer from 10.1.2.3", ErrSourceUnavailable)
				case many.Public():
					return ErrBusy
				}
				return errors.New("secret of the operator")
			}
			served := (*tls.Certificate)(nil)
			if tt.tls {
				c.GetCertificate, served = getCertificate, cert
			}
			ln := listen(t)
			r := start(t, c, ln)
			inside := connect(t, ln, served, member)
			accepts := webSocketAccepts.Value()
			stranger := key.NewNode()
			var ends []<-chan error
			for _, who := range []struct {
				private   key.NodePrivate
				app, want string
			}{
				{stranger, "", "this relay does not admit this node, whose key is " + stranger.Public().ShortString() + "; the owner of the relay can admit it"},
				{away, "", "this relay cannot ask who may use it now"},
				{many, "", "too many new nodes connect to this relay now; the next attempt may succeed"},
				{member, "unwanted", "this relay does not admit the app of this client"},
			} {
				refused := tt.new(t, ln, who.private, who.app)
				message, err := refused.Recv()
				if got, ok := message.(derp.HealthMessage); err != nil || !ok || got.Problem != who.want {
					t.Fatalf("the first message is %#v, %v; want %q", message, err, who.want)
				}
				if err := refused.Send(member.Public(), []byte("from a refused client")); err != nil {
					t.Error(err)
				}
				end := make(chan error, 1)
				go func() {
					message, err := refused.Recv()
					if err == nil {
						err = fmt.Errorf("another message: %#v", message)
					}
					end <- err
				}()
				ends = append(ends, end)
			}
			testkit.Exchange(t, inside, connect(t, ln, served, other)) // fails for the packets of refused clients
			if got, want := webSocketAccepts.Value()-accepts, int64(4); strings.HasPrefix(kind, "WebSocket") && got != want {
				t.Errorf("%d WebSockets counted, want %d", got, want)
			}
			testkit.Until(t, "four clients are held, and one text of each kind is counted", func() bool {
				told := r.Told()
				return told.Held == 4 && maps.Equal(told.Texts, map[string]int64{"busy": 1, "refused": 1, "unavailable": 1, "app": 1})
			})
			for _, end := range ends {
				select {
				case err := <-end:
					t.Errorf("the connection is not held: %v", err)
				default:
				}
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
			for _, end := range ends {
				if err := testkit.Receive(t, "the end of a held connection", end); err == nil || strings.HasPrefix(err.Error(), "another message") {
					t.Errorf("a held connection ended with %v", err)
				}
			}
			if r.sessions.teller.ctx.Err() == nil {
				t.Error("connections may be held after Close")
			}
			if held := r.Told().Held; held != 0 {
				t.Errorf("%d connections held after Close", held)
			}
		})
	}
}

// Without TellClients, a refused client is closed without a message, and Tell
// does nothing.
func TestRefusedIsNotTold(t *testing.T) {
	ln := listen(t)
	member := key.NewNode()
	r := start(t, Config{Log: zerolog.Nop(), Admit: func(_ context.Context, node key.NodePublic, _ netip.Addr) error {
		if node != member.Public() {
			return errors.New("not a member")
		}
		return nil
	}}, ln)
	c := client(t, ln, nil, key.NewNode())
	if message, err := c.Recv(); err == nil {
		t.Errorf("a refused client received %#v", message)
	}
	inside := connect(t, ln, nil, member)
	r.Tell(t.Context(), "test", "a text")
	if err := inside.SendPing([8]byte{1}); err != nil {
		t.Fatal(err)
	}
	if message, err := inside.Recv(); err != nil || message != (derp.PongMessage{1}) {
		t.Errorf("received %#v, %v, want a pong", message, err)
	}
	if told := r.Told(); told.Held != 0 || len(told.Texts) != 0 {
		t.Errorf("told %+v", told)
	}
}

// Tell reaches each client once, between the frames of a busy connection, takes
// the text back, and leaves out connections that are not admitted.
func TestTell(t *testing.T) {
	cert, getCertificate := certificate(t)
	ln := listen(t)
	r := start(t, Config{GetCertificate: getCertificate, Log: zerolog.Nop(), TellClients: true}, ln)
	trust := testkit.Trust(testkit.Pool(cert))
	waiting := dialTLS(t, ln, trust)
	if _, err := io.WriteString(waiting, "GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(waiting, make([]byte, derp.FrameHeaderLen+len(derp.Magic)+derp.KeyLen)); err != nil {
		t.Fatal(err)
	}
	from, to := connect(t, ln, cert, key.NewNode()), connect(t, ln, cert, key.NewNode())
	sending, stop := context.WithCancel(t.Context())
	var traffic sync.WaitGroup
	traffic.Go(func() {
		packet := random(1300)
		for sending.Err() == nil {
			if err := from.Send(to.SelfPublicKey(), packet); err != nil {
				t.Error(err)
				return
			}
		}
	})
	texts, first := make(chan string, 1000), make(chan struct{})
	begun := sync.OnceFunc(func() { close(first) })
	traffic.Go(func() {
		defer close(texts)
		for {
			message, err := to.Recv()
			if err != nil {
				t.Error(err)
				return
			}
			switch m := message.(type) {
			case derp.ReceivedPacket:
				begun()
				if len(m.Data) != 1300 {
					t.Errorf("a packet of %d bytes", len(m.Data))
				}
			case derp.HealthMessage:
				if texts <- m.Problem; m.Problem == "end" {
					return
				}
			}
		}
	})
	testkit.Receive(t, "the first packet", first)
	const rounds = 100
	for i := range rounds {
		text := fmt.Sprint("text ", i)
		for _, text := range []string{text, text, "", ""} {
			ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
			r.Tell(ctx, "test", text)
			if ctx.Err() != nil {
				t.Errorf("Tell did not reach every client within %s", testkit.Patience)
			}
			cancel()
		}
	}
	r.Tell(t.Context(), "test", "end")
	for i := range rounds {
		for _, want := range []string{fmt.Sprint("text ", i), ""} {
			if got := testkit.Receive(t, "a text", texts); got != want {
				t.Fatalf("text %q, want %q", got, want)
			}
		}
	}
	if got := testkit.Receive(t, "the last text", texts); got != "end" {
		t.Fatalf("text %q, want the last one", got)
	}
	stop()
	traffic.Wait()
	if told := r.Told(); told.Texts["test"] != 2*(rounds+1) || told.Held != 0 {
		t.Errorf("told %+v, want %d texts to two clients", told, 2*(rounds+1))
	}
	if err := waiting.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := waiting.Read(make([]byte, 1)); n > 0 || err == nil {
		t.Error("a text for a connection that is not admitted")
	}
}

// A text waits while derpserver is inside a frame, and follows the frame.
func TestTellBetweenFrames(t *testing.T) {
	below := new(recorder)
	s := sessionOf(below, nil)
	tell := func(text string) (done, sent bool) {
		write, done := s.tell(text)
		return done, write != nil && write() == nil
	}
	if done, sent := tell("early"); !done || sent {
		t.Errorf("before the first frame: done %t, sent %t", done, sent)
	}
	whole := frame(3000)
	whole[0] = byte(derp.FrameRecvPacket)
	for _, part := range [][]byte{whole[:2], whole[2:2000]} {
		if _, err := s.Write(part); err != nil {
			t.Fatal(err)
		}
		if done, sent := tell("x"); sent || done && part[0] == 0 {
			t.Errorf("inside a frame: done %t, sent %t", done, sent)
		}
	}
	if _, err := s.Write(whole[2000:]); err != nil {
		t.Fatal(err)
	}
	if done, sent := tell("x"); !done || !sent {
		t.Errorf("after the frame: done %t, sent %t", done, sent)
	}
	if got, want := below.bytes(), append(bytes.Clone(whole), byte(derp.FrameHealth), 0, 0, 0, 1, 'x'); !bytes.Equal(got, want) {
		t.Errorf("%d bytes sent, want the frame and then the text: %d", len(got), len(want))
	}
	s.writeMu.Lock() // as during a write that blocks
	if done, sent := tell("y"); done || sent {
		t.Errorf("during a write: done %t, sent %t", done, sent)
	}
	s.writeMu.Unlock()
}

// A client that derpserver is about to answer gets the text after the answer. A client
// that has not sent its key is not waited for.
func TestTellAfterTheAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all, _ := holding(maxHeld)
		silent := newSession(all, new(recorder), nil, nil)
		all.add(silent)
		below := new(recorder)
		s := newSession(all, below, nil, nil)
		s.node = key.NewNode().Public()
		all.add(s)
		told := make(chan struct{})
		go func() {
			(&Relay{sessions: all}).Tell(t.Context(), "test", "a text")
			close(told)
		}()
		<-time.After(3 * retellEvery)
		select {
		case <-told:
			t.Fatal("Tell did not wait for the answer")
		default:
		}
		info := frame(100)
		info[0] = byte(derp.FrameServerInfo)
		if _, err := s.Write(info); err != nil {
			t.Fatal(err)
		}
		<-told
		if got, want := below.bytes(), append(bytes.Clone(info), healthFrame("a text")...); !bytes.Equal(got, want) {
			t.Errorf("%d bytes sent, want the answer and then the text: %d", len(got), len(want))
		}
		all.end()
	})
}

// A client that does not read delays no text for another client.
func TestTellPastStuckClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all, _ := holding(maxHeld)
		const stuck = tellAtOnce - 1
		far := make([]net.Conn, stuck+1)
		for i := range far {
			var near net.Conn
			near, far[i] = net.Pipe()
			s := newSession(all, near, nil, near.RemoteAddr())
			all.add(s)
			info := frame(100)
			info[0] = byte(derp.FrameServerInfo)
			go func() { _, _ = s.Write(info) }()
			if _, err := io.ReadFull(far[i], make([]byte, len(info))); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		begun := time.Now()
		go func() { (&Relay{sessions: all}).Tell(t.Context(), "test", "a text") }()
		if _, err := io.ReadFull(far[stuck], make([]byte, len(healthFrame("a text")))); err != nil {
			t.Error(err)
		}
		if took := time.Since(begun); took > 0 {
			t.Errorf("the text took %s past %d clients that do not read", took, stuck)
		}
		<-time.After(textTimeout + deadlineStep)
		synctest.Wait()
		if told := (&Relay{sessions: all}).Told().Texts["test"]; told != 1 {
			t.Errorf("%d texts are counted, want 1", told)
		}
		all.end()
	})
}
