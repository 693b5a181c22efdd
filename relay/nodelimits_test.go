package relay

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// sender is a client that can be closed.
type sender interface {
	testkit.Client
	Close() error
}

// webSocketSender is a WebSocket whose connection can be closed.
type webSocketSender struct {
	testkit.WebSocket
	close func() error
}

func (c webSocketSender) Close() error { return c.close() }

// dialSender returns a WebSocket.
func dialSender(t *testing.T, ln net.Listener, trust *tls.Config) sender {
	t.Helper()
	var below net.Conn
	transport := &http.Transport{TLSClientConfig: trust, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		below = conn
		return conn, err
	}}
	w := testkit.WebSocketClient(t, "wss://"+ln.Addr().String()+"/derp", transport, nil)
	return webSocketSender{w, below.Close}
}

// A node whose reader waits is gone at once when the relay disconnects it, closes, or
// when the client goes, on every kind of connection. Its next bytes would be read after
// hours.
func TestLimitedNodeEnds(t *testing.T) {
	cert, getCertificate := certificate(t)
	kinds := map[string]struct {
		tls  bool
		dial func(*testing.T, net.Listener) sender
	}{
		"TLS": {true, func(t *testing.T, ln net.Listener) sender { return connect(t, ln, cert, key.NewNode()) }},
		"TCP": {false, func(t *testing.T, ln net.Listener) sender { return connect(t, ln, nil, key.NewNode()) }},
		"WebSocket": {true, func(t *testing.T, ln net.Listener) sender {
			return dialSender(t, ln, testkit.Trust(testkit.Pool(cert)))
		}},
	}
	ends := map[string]func(*Relay, sender) error{
		"client":     func(_ *Relay, c sender) error { return c.Close() },
		"Disconnect": func(r *Relay, c sender) error { return r.Disconnect(c.SelfPublicKey()) },
		"Close":      func(r *Relay, _ sender) error { return r.Close() },
	}
	for kind, tt := range kinds {
		for name, end := range ends {
			t.Run(kind+" "+name, func(t *testing.T) {
				ln := listen(t)
				c := Config{Log: zerolog.Nop(), NodeLimit: func(key.NodePublic) NodeLimit { return NodeLimit{Rate: 1, Burst: 4096} }}
				if tt.tls {
					c.GetCertificate = getCertificate
				}
				r := start(t, c, ln)
				go func() { _ = r.Run(t.Context()) }()
				sends := tt.dial(t, ln)
				awaitClients(t, r, sends.SelfPublicKey())
				packet := random(1000)
				for range 20 {
					if err := sends.Send(key.NewNode().Public(), packet); err != nil {
						t.Fatal(err)
					}
				}
				testkit.Until(t, "the reader waits", func() bool {
					r.sessions.mu.Lock()
					defer r.sessions.mu.Unlock()
					n := r.sessions.nodes[sends.SelfPublicKey()]
					return n.pace.limiter.Tokens() < 0
				})
				if err := end(r, sends); err != nil {
					t.Fatal(err)
				}
				testkit.Until(t, "the node is gone", func() bool { return r.sessions.count() == 0 })
			})
		}
	}
}

// A node has at most its number of connections: the newest. Other nodes keep theirs.
func TestConnectionsOfNode(t *testing.T) {
	ln := listen(t)
	r := start(t, Config{Log: zerolog.Nop(), NodeLimit: func(key.NodePublic) NodeLimit { return NodeLimit{Connections: 3} }}, ln)
	node, other := key.NewNode(), connect(t, ln, nil, key.NewNode())
	var all []*derphttp.Client
	for range 8 {
		all = append(all, connect(t, ln, nil, node))
	}
	for _, c := range all[:5] {
		for {
			if _, err := c.Recv(); err != nil {
				break
			}
		}
	}
	if n, slowed := r.Connections(node.Public()); n != 3 || slowed {
		t.Errorf("%d connections, slowed %t; want 3", n, slowed)
	}
	if got := r.LimitedNodes(); got != (LimitedNodes{Replaced: 5}) {
		t.Errorf("%+v, want 5 connections replaced", got)
	}
	testkit.Exchange(t, all[7], other)
	for _, c := range all[5:7] { // they answer
		if err := c.SendPing([8]byte{1}); err != nil {
			t.Fatal(err)
		}
		for {
			message, err := c.Recv()
			if err != nil {
				t.Fatalf("a connection among the newest has ended: %v", err)
			}
			if _, ok := message.(derp.PongMessage); ok {
				break
			}
		}
	}
	for _, c := range all {
		_ = c.Close()
	}
	testkit.Until(t, "nothing is kept of the node", func() bool {
		r.sessions.mu.Lock()
		defer r.sessions.mu.Unlock()
		return len(r.sessions.nodes) == 1
	})
}

// Without NodeLimit no node has a limit.
func TestNoLimits(t *testing.T) {
	ln := listen(t)
	r := start(t, Config{Log: zerolog.Nop()}, ln)
	a, b := connect(t, ln, nil, key.NewNode()), connect(t, ln, nil, key.NewNode())
	testkit.Exchange(t, a, b)
	if n, slowed := r.Connections(a.SelfPublicKey()); n != 1 || slowed || r.LimitedNodes() != (LimitedNodes{}) {
		t.Errorf("%d connections, %+v", n, r.LimitedNodes())
	}
	r.ApplyNodeLimits()
}

// Another node of the region has no rate, and a client of this relay has one. A client
// cannot pretend to be such a node.
func TestMeshHasNoRate(t *testing.T) {
	cert, getCertificate := certificate(t)
	secret := meshKey(t, "correct horse battery")
	lnA, lnB := listen(t), listen(t)
	relayOf := func(ln net.Listener, nodes ...MeshNode) *Relay {
		r := start(t, Config{
			Log: zerolog.Nop(), GetCertificate: getCertificate, Mesh: MeshConfig{Key: secret, Nodes: nodes},
			NodeLimit: func(key.NodePublic) NodeLimit { return NodeLimit{Rate: 10_000_000, Burst: 1_000_000} },
		}, ln)
		runMesh(t, r)
		return r
	}
	a := relayOf(lnA, peerOf(lnB, cert))
	b := relayOf(lnB, peerOf(lnA, cert))
	onA, onB := connect(t, lnA, cert, key.NewNode()), connect(t, lnB, cert, key.NewNode())
	pretends := client(t, lnA, cert, key.NewNode())
	pretends.MeshKey = meshKey(t, "another horse's battery")
	testkit.MustAdmit(t, pretends)
	testkit.Exchange(t, onA, onB)
	testkit.Exchange(t, pretends, onA)
	a.ApplyNodeLimits()
	for node, want := range map[key.NodePublic]bool{b.PublicKey(): false, onA.SelfPublicKey(): true, pretends.SelfPublicKey(): true} {
		a.sessions.mu.Lock()
		n := a.sessions.nodes[node]
		for _, s := range n.sessions {
			if got := s.paced.Load() != nil; got != want || n.mesh == want {
				t.Errorf("%s has a rate: %t, want %t", node.ShortString(), got, want)
			}
		}
		a.sessions.mu.Unlock()
	}
	if got := a.LimitedNodes().Nodes; got != 2 {
		t.Errorf("%d nodes with a rate, want 2", got)
	}
}

// texts returns the health problems that a client gets.
func texts(far net.Conn) <-chan string {
	list := make(chan string, 100)
	go func() {
		for {
			var header [derp.FrameHeaderLen]byte
			if _, err := io.ReadFull(far, header[:]); err != nil {
				return
			}
			payload := make([]byte, binary.BigEndian.Uint32(header[1:]))
			if _, err := io.ReadFull(far, payload); err != nil {
				return
			}
			if derp.FrameType(header[0]) == derp.FrameHealth {
				list <- string(payload)
			}
		}
	}()
	return list
}

// none fails if there is a text.
func none(t *testing.T, when string, list <-chan string) {
	t.Helper()
	synctest.Wait()
	select {
	case text := <-list:
		t.Errorf("%s: the text %q", when, text)
	default:
	}
}

// next returns the text that there is.
func next(t *testing.T, when string, list <-chan string) string {
	t.Helper()
	synctest.Wait()
	select {
	case text := <-list:
		return text
	default:
		t.Errorf("%s: no text", when)
		return ""
	}
}

// A node that has been slowed down for ten seconds gets a text on each connection, once,
// and an empty one afterwards. A text for every client replaces the text meanwhile.
func TestSlowedIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all, limit := limiting(NodeLimit{Rate: 20_000, Burst: 64 << 10})
		r := &Relay{sessions: all}
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _ = r.RunNodeLimits(ctx) }()
		node := key.NewNode().Public()
		answered := func(node key.NodePublic) (*session, net.Conn, <-chan string) {
			s, far := join(t, all, node)
			list := texts(far)
			info := frame(100)
			info[0] = byte(derp.FrameServerInfo)
			if _, err := s.Write(info); err != nil {
				t.Fatal(err)
			}
			go func() { _, _ = io.Copy(io.Discard, s) }()
			return s, far, list
		}
		_, far, list := answered(node)
		_, _, second := answered(node)
		_, quiet, others := answered(key.NewNode().Public())
		_, _ = far.Write(make([]byte, 64<<10)) // the burst
		sending, stop := context.WithCancel(ctx)
		send := func(ctx context.Context) {
			for ctx.Err() == nil {
				_, _ = far.Write(make([]byte, 1400))
			}
		}
		go send(sending)
		go func() { // sends less than its limit
			for ctx.Err() == nil {
				_, _ = quiet.Write(make([]byte, 15_000))
				<-time.After(time.Second)
			}
		}()
		<-time.After(10*time.Second + time.Millisecond)
		none(t, "after ten seconds", list)
		<-time.After(2 * time.Second)
		const want = "this node may send at most 160 kbit/s through this relay; the owner of the relay can raise the limit"
		if got := next(t, "after twelve seconds", list); got != want {
			t.Errorf("text %q, want %q", got, want)
		}
		if got := next(t, "on the other connection", second); got != want {
			t.Errorf("text %q, want %q", got, want)
		}
		if got := r.LimitedNodes(); got.Nodes != 2 || got.Slowed != 1 || got.Waits == 0 || got.Waited < 9*time.Second || got.Waited > 13*time.Second {
			t.Errorf("%+v", got)
		}
		if n, slowed := r.Connections(node); n != 2 || !slowed {
			t.Errorf("%d connections, slowed %t", n, slowed)
		}
		r.Tell(ctx, "certificate", "")
		<-time.After(5 * time.Second)
		none(t, "while it is slowed down", list)
		r.Tell(ctx, "certificate", "the certificate ends")
		if got := next(t, "for every client", list); got != "the certificate ends" {
			t.Errorf("text %q", got)
		}
		r.Tell(ctx, "certificate", "")
		if got := next(t, "after the text for every client", list); got != want {
			t.Errorf("text %q, want %q", got, want)
		}
		stop()
		<-time.After(5 * time.Second)
		if got := next(t, "after it has stopped", list); got != "" {
			t.Errorf("text %q, want the empty one", got)
		}
		// Slowed down again, until the limit is lifted.
		sending, stop = context.WithCancel(ctx)
		go send(sending)
		<-time.After(16 * time.Second)
		if got := next(t, "slowed down again", list); got != want {
			t.Errorf("text %q, want %q", got, want)
		}
		stop()
		limit.Store(&NodeLimit{})
		<-time.After(11 * time.Second)
		if got := next(t, "without a limit", list); got != "" {
			t.Errorf("text %q, want the empty one", got)
		}
		if got, want := next(t, "another node", others), "the certificate ends"; got != want {
			t.Errorf("another node has the text %q, want %q", got, want)
		}
		if got := next(t, "another node", others); got != "" {
			t.Errorf("another node has the text %q", got)
		}
		none(t, "another node", others)
		if told := r.Told().Texts["slowed"]; told != 6 {
			t.Errorf("%d texts are counted, want 6", told)
		}
		cancel()
		all.end()
		<-time.After(time.Second) // the end of the sender
	})
}
