package relay

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/derp/derpserver"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"derpd/internal/testkit"
	"derpd/relay/derpmap"
)

func meshKey(t testing.TB, text string) key.DERPMesh {
	t.Helper()
	k, err := ParseMeshKey(text)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// peerOf returns the entry of a listener, with the pin of its certificate.
func peerOf(ln net.Listener, cert *tls.Certificate) MeshNode {
	addr := ln.Addr().(*net.TCPAddr)
	sum := sha256.Sum256(cert.Certificate[0])
	return MeshNode{Host: addr.IP.String(), Port: addr.Port, CertHash: hex.EncodeToString(sum[:])}
}

// startMesh starts a relay in a mesh with the given nodes.
func startMesh(t *testing.T, ln net.Listener, cert *tls.Certificate, c MeshConfig) *Relay {
	t.Helper()
	if c.Describe == nil {
		c.Describe = func(context.Context) (derpmap.Node, error) {
			return derpmap.Node{HostName: ln.Addr().String()}, nil
		}
	}
	r := start(t, Config{
		Mesh: c, Log: zerolog.Nop(),
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil },
	}, ln)
	runMesh(t, r)
	return r
}

// runMesh runs the mesh of r until the test ends.
func runMesh(t *testing.T, r *Relay) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.Mesh().Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := testkit.Receive(t, "the end of the mesh", ended); err != nil {
			t.Error(err)
		}
	})
}

// awaitState waits until the state of the first other node satisfies holds.
func awaitState(t *testing.T, n *Relay, what string, holds func(MeshState) bool) MeshState {
	t.Helper()
	var got MeshState
	testkit.Until(t, what, func() bool {
		got = n.Mesh().States()[0]
		return holds(got)
	})
	return got
}

// Two nodes forward packets for each other's clients. When a node stops,
// the other node retries, and has no clients of the stopped node.
func TestMesh(t *testing.T) {
	cert, _ := certificate(t)
	secret := meshKey(t, "correct horse battery")
	lnA, lnB := listen(t), listen(t)
	a := startMesh(t, lnA, cert, MeshConfig{Key: secret, Nodes: []MeshNode{peerOf(lnB, cert)}})
	t.Run("up", func(t *testing.T) {
		startMesh(t, lnB, cert, MeshConfig{Key: secret, Nodes: []MeshNode{peerOf(lnA, cert)}})
		onA, onB := connect(t, lnA, cert, key.NewNode()), connect(t, lnB, cert, key.NewNode())
		testkit.Exchange(t, onA, onB)
		state := awaitState(t, a, "one client of the other node", func(s MeshState) bool { return s.Up && s.Clients == 1 })
		if !strings.Contains(a.Metrics().String(), `"gauge_clients_remote": 1`) {
			t.Errorf("the metrics have another number of remote clients: %s", a.Metrics())
		}
		if state.Node != lnB.Addr().String() || state.Err != nil || state.Self || time.Since(state.Since) > testkit.Patience {
			t.Errorf("state %+v", state)
		}
		second := connect(t, lnB, cert, key.NewNode())
		awaitState(t, a, "two clients", func(s MeshState) bool { return s.Clients == 2 })
		_ = second.Close()
		awaitState(t, a, "one client", func(s MeshState) bool { return s.Clients == 1 })
		testkit.Exchange(t, onA, onB)
	}) // stops b
	state := awaitState(t, a, "down", func(s MeshState) bool { return !s.Up })
	if state.Clients != 0 || state.Err == nil {
		t.Errorf("state %+v of a stopped node", state)
	}
	testkit.Until(t, "no client is remote", func() bool { return strings.Contains(a.Metrics().String(), `"gauge_clients_remote": 0`) })
}

// A node recognizes itself, and does not connect again.
func TestMeshSelf(t *testing.T) {
	cert, _ := certificate(t)
	ln := listen(t)
	n := startMesh(t, ln, cert, MeshConfig{Key: meshKey(t, "correct horse battery"), Nodes: []MeshNode{peerOf(ln, cert)}})
	state := awaitState(t, n, "self", func(s MeshState) bool { return s.Self })
	if state.Up || state.Clients != 0 || !errors.Is(state.Err, errSelf) {
		t.Errorf("state %+v", state)
	}
}

// The cause of a failed connection is in the state.
func TestMeshErrors(t *testing.T) {
	cert, getCertificate := certificate(t)
	secret := meshKey(t, "correct horse battery")
	stranger := func(t *testing.T, c Config) MeshNode {
		ln := listen(t)
		c.GetCertificate, c.Log = getCertificate, zerolog.Nop()
		start(t, c, ln)
		return peerOf(ln, cert)
	}
	for name, tt := range map[string]struct {
		node func(t *testing.T) MeshNode
		want string
	}{
		"another key": {func(t *testing.T) MeshNode {
			return stranger(t, Config{Mesh: MeshConfig{Key: meshKey(t, "correct horse battery staple")}})
		}, errMeshKey.Error()},
		"no mesh": {func(t *testing.T) MeshNode { return stranger(t, Config{}) }, errMeshKey.Error()},
		"another key, and the refused connection is held": {func(t *testing.T) MeshNode {
			return stranger(t, Config{TellClients: true, Admit: func(context.Context, key.NodePublic, netip.Addr) error {
				return errors.New("not a member")
			}})
		}, errMeshKey.Error()},
		"another certificate": {func(t *testing.T) MeshNode {
			n := stranger(t, Config{Mesh: MeshConfig{Key: secret}})
			n.CertHash = strings.Repeat("00", 32)
			return n
		}, "cert hash does not match"},
		"unknown authority": {func(t *testing.T) MeshNode {
			n := stranger(t, Config{Mesh: MeshConfig{Key: secret}})
			n.CertHash = ""
			return n
		}, "x509"},
		"nobody listens": {func(t *testing.T) MeshNode {
			ln := listen(t)
			_ = ln.Close()
			return peerOf(ln, cert)
		}, "connection refused"},
		"another server": {func(t *testing.T) MeshNode {
			ln := tls.NewListener(listen(t), &tls.Config{Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS12})
			server := &http.Server{Handler: http.NotFoundHandler(), ReadTimeout: testkit.Patience}
			go func() { _ = server.Serve(ln) }()
			t.Cleanup(func() { _ = server.Close() })
			return peerOf(ln, cert)
		}, "the node returned 404 Not Found"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRelay(t, Config{Mesh: MeshConfig{Key: secret, Nodes: []MeshNode{tt.node(t)}}, Log: zerolog.Nop()})
			runMesh(t, r)
			state := awaitState(t, r, "an error", func(s MeshState) bool { return s.Err != nil })
			if state.Up || state.Self || !strings.Contains(state.Err.Error(), tt.want) {
				t.Errorf("state %+v, want the error %q", state, tt.want)
			}
		})
	}
}

// Roots verify a certificate that an authority signed. Dial is the address, and
// Host the name to verify.
func TestMeshRootsAndDial(t *testing.T) {
	authority := testkit.NewAuthority(t)
	cert := testkit.NewCertificate(t, testkit.Certificate{Names: []string{"derp.example.com"}, Issuer: authority})
	secret := meshKey(t, "correct horse battery")
	ln := listen(t)
	startMesh(t, ln, cert, MeshConfig{Key: secret})
	entry := MeshNode{Host: "derp.example.com", Port: 443, Dial: ln.Addr().String()}
	r := newRelay(t, Config{Log: zerolog.Nop(), Mesh: MeshConfig{Key: secret, Roots: testkit.Pool(authority), Nodes: []MeshNode{entry}}})
	runMesh(t, r)
	state := awaitState(t, r, "up", func(s MeshState) bool { return s.Up })
	if want := "derp.example.com:443/" + ln.Addr().String(); state.Node != want {
		t.Errorf("the state is of %q, want %q", state.Node, want)
	}
}

// silence is a listener. Its connections can stop passing bytes to the relay.
type silence struct {
	net.Listener
	mu    sync.Mutex
	conns []*silentConn // guarded by mu
}

type silentConn struct {
	net.Conn
	once   sync.Once
	silent chan struct{}
}

func (l *silence) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &silentConn{Conn: conn, silent: make(chan struct{})}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = append(l.conns, c)
	return c, nil
}

// Write drops p once the connection is silent.
func (c *silentConn) Write(p []byte) (int, error) {
	select {
	case <-c.silent:
		return len(p), nil
	default:
		return c.Conn.Write(p)
	}
}

func (l *silence) begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		c.once.Do(func() { close(c.silent) })
	}
}

// A node that stops answering is down.
func TestMeshSilence(t *testing.T) {
	cert, _ := certificate(t)
	secret := meshKey(t, "correct horse battery")
	ln := &silence{Listener: listen(t)}
	startMesh(t, ln, cert, MeshConfig{Key: secret})
	r := newRelay(t, Config{Log: zerolog.Nop(), Mesh: MeshConfig{Key: secret, Nodes: []MeshNode{peerOf(ln, cert)}}})
	r.mesh.pingEvery = 100 * time.Millisecond
	runMesh(t, r)
	up := awaitState(t, r, "up", func(s MeshState) bool { return s.Up })
	ln.begin()
	down := awaitState(t, r, "down", func(s MeshState) bool { return !s.Up || s.Since != up.Since })
	if !down.Up && !errors.Is(down.Err, errSilent) {
		t.Errorf("state %+v, want %v", down, errSilent)
	}
}

// Pings keep a connection, and end it after two intervals without a message or
// when a ping cannot be sent.
func TestMeshPings(t *testing.T) {
	const interval = time.Second
	for name, tt := range map[string]struct {
		answers, reads bool // of the node
		want           time.Duration
	}{
		"the node answers": {true, true, 0},
		"silent node":      {false, true, 2 * interval},
		"stuck connection": {false, false, 2 * interval},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, far := net.Pipe()
				defer func() { _ = far.Close() }()
				go greetMesh(far)
				client, err := derp.NewClient(key.NewNode(), near, bufio.NewReadWriter(bufio.NewReader(near), bufio.NewWriter(near)), logger.Discard)
				if err != nil {
					t.Fatal(err)
				}
				begun := time.Now()
				l := &meshLink{Client: client, hangUp: func(error) { _ = near.Close() }}
				ctx, cancel := context.WithCancel(t.Context())
				var wg sync.WaitGroup
				wg.Go(func() { l.pingEvery(ctx, interval) })
				wg.Go(func() {
					for tt.reads {
						if _, err := io.ReadFull(far, make([]byte, derp.FrameHeaderLen+8)); err != nil {
							return
						}
						if tt.answers {
							l.silent.Store(false) // as link does after each message
						}
					}
				})
				closed := make(chan time.Duration, 1)
				wg.Go(func() {
					_, _ = near.Read(make([]byte, 1))
					closed <- time.Since(begun)
				})
				select {
				case got := <-closed:
					if got != tt.want {
						t.Errorf("closed after %v, want %v (0: never)", got, tt.want)
					}
				case <-time.After(10*interval + interval/2):
					if tt.want != 0 {
						t.Errorf("still open, want the end after %v", tt.want)
					}
				}
				cancel()
				_ = near.Close()
				wg.Wait()
			})
		})
	}
}

// The state keeps the time of the last change, however often a connection
// fails.
func TestMeshDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		p := &meshPeer{state: MeshState{Since: begun}}
		<-time.After(time.Minute)
		if p.down(io.EOF) || p.state.Since != begun || !errors.Is(p.state.Err, io.EOF) {
			t.Errorf("a failed connect: %+v", p.state)
		}
		p.set(func(s *MeshState) { s.Up, s.Since = true, time.Now() })
		<-time.After(time.Minute)
		if !p.down(errSelf) || p.state.Up || p.state.Since != time.Now() || !p.state.Self {
			t.Errorf("a lost connection: %+v", p.state)
		}
	})
}

func TestMeshPauses(t *testing.T) {
	pause := firstMeshPause
	for range 4 {
		pause = longerPause(pause)
	}
	if pause != 1600*time.Millisecond {
		t.Errorf("the fifth pause is %v, want 1.6s", pause)
	}
	if pause = longerPause(pause); pause != 2*time.Second {
		t.Errorf("the longest pause is %v, want 2s", pause)
	}
}

// greetMesh is the server's part of a handshake.
func greetMesh(conn net.Conn) {
	private := key.NewNode()
	greeting := append([]byte(derp.Magic), private.Public().AppendTo(nil)...)
	_, _ = conn.Write(binary.BigEndian.AppendUint32([]byte{byte(derp.FrameServerKey)}, uint32(len(greeting))))
	_, _ = conn.Write(greeting)
	header := make([]byte, derp.FrameHeaderLen)
	_, _ = io.ReadFull(conn, header)
	_, _ = io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint32(header[1:])))
}

// Only the notice that a client has disconnected forgets the client: other
// notices are about one packet.
func TestMeshPeerGone(t *testing.T) {
	server := derpserver.New(key.NewNode(), logger.Discard)
	defer func() { _ = server.Close() }()
	p := &meshPeer{MeshNode: MeshNode{Host: "derp.example.com", Port: 443}}
	l := &meshLink{peer: p, server: server, clients: make(map[key.NodePublic]bool)}
	node, mesh := key.NewNode().Public(), key.NewNode().Public()
	for i, step := range []struct {
		message derp.ReceivedMessage
		want    int
	}{
		{derp.PeerPresentMessage{Key: mesh, Flags: derp.PeerPresentIsMeshPeer}, 0},
		{derp.PeerPresentMessage{Key: node}, 1},
		{derp.PeerPresentMessage{Key: node}, 1},
		{derp.PeerGoneMessage{Peer: node, Reason: derp.PeerGoneReasonNotHere}, 1},
		{derp.PeerGoneMessage{Peer: mesh, Reason: derp.PeerGoneReasonDisconnected}, 1},
		{derp.PeerGoneMessage{Peer: node, Reason: derp.PeerGoneReasonDisconnected}, 0},
		{derp.PeerGoneMessage{Peer: node, Reason: derp.PeerGoneReasonDisconnected}, 0},
	} {
		l.silent.Store(true)
		l.handle(step.message)
		if l.silent.Load() {
			t.Errorf("step %d: the node is silent after a message", i)
		}
		if p.state.Clients != step.want || len(l.clients) != step.want {
			t.Errorf("step %d: %d clients, want %d", i, p.state.Clients, step.want)
		}
	}
	l.handle(derp.PeerPresentMessage{Key: node})
	l.forgetAll()
	if p.state.Clients != 0 {
		t.Errorf("%d clients of a connection that ended", p.state.Clients)
	}
}

// Descriptions come from the nodes that run. Of a node that fails there is the
// latest one, and the error. Without the key a request gets the home page.
func TestMeshDescriptions(t *testing.T) {
	cert, _ := certificate(t)
	secret := meshKey(t, "correct horse battery")
	lnB, lnC, lnD, lnE := listen(t), listen(t), listen(t), listen(t)
	r := newRelay(t, Config{Log: zerolog.Nop(), Mesh: MeshConfig{Key: secret, Nodes: []MeshNode{peerOf(lnB, cert), peerOf(lnC, cert), peerOf(lnD, cert), peerOf(lnE, cert)}}})
	unready := errors.New("the address is not known yet")
	startMesh(t, lnC, cert, MeshConfig{Key: meshKey(t, "correct horse battery staple")})
	startMesh(t, lnD, cert, MeshConfig{Key: secret, Describe: func(context.Context) (derpmap.Node, error) { return derpmap.Node{}, unready }})
	startMesh(t, lnE, cert, MeshConfig{Key: secret, Describe: func(context.Context) (derpmap.Node, error) { return derpmap.Node{}, nil }})
	t.Run("while all run", func(t *testing.T) {
		startMesh(t, lnB, cert, MeshConfig{Key: secret})
		got := r.Mesh().Descriptions(t.Context())
		if got[0].Node.HostName != lnB.Addr().String() || got[0].Err != nil || got[0].From != lnB.Addr().String() {
			t.Errorf("a node of the mesh: %+v", got[0])
		}
		for i, ln := range []net.Listener{lnC, lnD, lnE} {
			if d := got[i+1]; d.Node.HostName != "" || !errors.Is(d.Err, errNoDescription) || d.From != ln.Addr().String() {
				t.Errorf("another key, not ready, or empty: %+v", d)
			}
		}
	}) // stops lnB
	got := r.Mesh().Descriptions(t.Context())
	if got[0].Node.HostName != lnB.Addr().String() || got[0].Err == nil {
		t.Errorf("a node that has stopped: %+v, want the latest description and an error", got[0])
	}

	c := &http.Client{Transport: &http.Transport{TLSClientConfig: testkit.Trust(testkit.Pool(cert)), DisableKeepAlives: true}}
	for token, want := range map[string]string{"": "text/html; charset=utf-8", meshToken(secret): "text/html; charset=utf-8", meshToken(meshKey(t, "correct horse battery staple")): meshNodeType} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+lnC.Addr().String()+meshPath, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set(meshTokenHeader, token)
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if got := res.Header.Get("Content-Type"); got != want {
			t.Errorf("token %q: %s, want %s", token, got, want)
		}
	}
}
