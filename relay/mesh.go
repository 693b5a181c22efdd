package relay

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/derp/derpserver"
	"tailscale.com/net/tlsdial"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"derpd/relay/derpmap"
)

const (
	// meshTimeout bounds everything up to the answer to the mesh key.
	meshTimeout = 10 * time.Second

	// A node that was restarted is back within a second or two, and so are
	// its clients: the first attempts are close together. The last pause is
	// short as well, since an attempt costs next to nothing.
	firstMeshPause, longestMeshPause = 100 * time.Millisecond, 2 * time.Second

	// meshPingEvery finds a node that vanished without closing its
	// connection: until then, what is forwarded to it is lost.
	meshPingEvery = 5 * time.Second
)

var (
	errSelf      = errors.New("this is the node itself")
	errMeshKey   = errors.New("it hung up on the mesh key: it has another one, or is stopping")
	errNoMessage = errors.New("it does not answer any more")
)

// MeshConfig is how the nodes of one region know each other.
type MeshConfig struct {
	// Key is the secret that the nodes share. The zero key is no mesh.
	Key key.DERPMesh

	// Nodes are the others. This node itself may be among them: it knows
	// itself by its node key.
	Nodes []MeshNode

	// Roots are who signs the certificates of the others; nil is who the
	// system trusts.
	Roots *x509.CertPool

	// Describe is what another node tells in its map about this one.
	Describe func(context.Context) (derpmap.Node, error)

	// PingEvery is for tests; 0 is every 5 seconds.
	PingEvery time.Duration
}

// MeshNode is how another node is reached.
type MeshNode struct {
	Host string // the name or address to verify and to send as SNI
	Port int

	// Dial is the host:port to connect to, if that is not Host and Port.
	Dial string

	// CertHash is the SHA-256 of a self-signed certificate, in hex. Empty is
	// for one that an authority signed.
	CertHash string
}

// hostPort is what Host and Port are in a URL.
func (n MeshNode) hostPort() string { return net.JoinHostPort(n.Host, strconv.Itoa(n.Port)) }

// String tells nodes apart, in logs and metrics.
func (n MeshNode) String() string {
	if n.Dial != "" {
		return n.hostPort() + "/" + n.Dial
	}
	return n.hostPort()
}

// Mesh forwards to the clients of the other nodes of the region. Its first
// half is upstream's: derpserver takes what other nodes forward, and tells
// them who is connected. This is the other one, which dials.
type Mesh struct {
	config MeshConfig
	self   key.NodePrivate
	server *derpserver.Server
	log    zerolog.Logger
	peers  []*meshPeer
}

// meshPeer is one of the other nodes.
type meshPeer struct {
	MeshNode

	mu        sync.Mutex
	state     MeshState    // guarded by mu
	described derpmap.Node // what was last heard; guarded by mu
}

// MeshState is the state of the connection to another node.
type MeshState struct {
	Node    string
	Self    bool      // it turned out to be this node
	Up      bool      // what is sent to its clients is forwarded
	Since   time.Time // when Up became what it is
	Clients int       // of that node
	Err     error     // the latest reason for not being up; nil before the first
}

func newMesh(c Config, server *derpserver.Server) *Mesh {
	m := &Mesh{config: c.Mesh, self: c.PrivateKey, server: server, log: c.Log}
	if m.config.PingEvery == 0 {
		m.config.PingEvery = meshPingEvery
	}
	for _, n := range m.config.Nodes {
		m.peers = append(m.peers, &meshPeer{MeshNode: n, state: MeshState{Node: n.String(), Since: time.Now()}})
	}
	return m
}

// Run keeps a connection to each of the other nodes until ctx ends.
func (m *Mesh) Run(ctx context.Context) error {
	var all sync.WaitGroup
	for _, p := range m.peers {
		all.Go(func() { m.keep(ctx, p) })
	}
	all.Wait()
	return nil
}

// States are the connections to the other nodes, in the order of the
// configuration.
func (m *Mesh) States() []MeshState {
	list := make([]MeshState, len(m.peers))
	for i, p := range m.peers {
		p.mu.Lock()
		list[i] = p.state
		p.mu.Unlock()
	}
	return list
}

// keep connects to one node again and again.
func (m *Mesh) keep(ctx context.Context, p *meshPeer) {
	wait := firstMeshPause
	for told := false; ; told = true {
		err := m.link(ctx, p)
		if ctx.Err() != nil {
			return
		}
		p.mu.Lock()
		lost := p.state.Up
		if lost {
			p.state.Since = time.Now()
		}
		p.state.Up, p.state.Clients, p.state.Err, p.state.Self = false, 0, err, errors.Is(err, errSelf)
		p.mu.Unlock()
		switch {
		case errors.Is(err, errSelf):
			m.log.Info().Stringer("node", p).Msg("this entry of the mesh is the node itself")
			return
		case lost:
			wait = firstMeshPause
			m.log.Warn().Stringer("node", p).Err(err).Msg("mesh connection lost")
		case !told:
			m.log.Warn().Stringer("node", p).Err(err).Msg("no mesh connection yet")
		}
		// Nodes that lost each other together do not come back in step.
		if !pause(ctx, wait/2+rand.N(wait)) {
			return
		}
		wait = min(2*wait, longestMeshPause)
	}
}

// meshLink is one connection. It is what derpserver forwards with, and never
// connects again by itself: a packet for a node that is gone is to be dropped
// at once, and its sender told.
type meshLink struct {
	*derp.Client
	peer   *meshPeer
	server *derpserver.Server
	conn   net.Conn
	silent atomic.Bool // nothing came since the latest ping

	clients map[key.NodePublic]bool // owned by link
}

// String is for derpserver's log.
func (l *meshLink) String() string { return l.peer.String() }

// link is one connection from beginning to end.
func (m *Mesh) link(ctx context.Context, p *meshPeer) error {
	conn, err := p.dial(ctx, m.config.Roots)
	if err != nil {
		return err
	}
	hangUp := func() { _ = conn.Close() }
	defer hangUp()
	defer context.AfterFunc(ctx, hangUp)()
	timeout := time.AfterFunc(meshTimeout, hangUp)
	defer timeout.Stop()

	client, err := upgrade(ctx, conn, p, m.self, m.config.Key)
	if err != nil {
		return err
	}
	if client.ServerPublicKey() == m.server.PublicKey() {
		return errSelf
	}
	if err := client.WatchConnectionChanges(); err != nil {
		return err
	}
	l := &meshLink{Client: client, peer: p, server: m.server, conn: conn, clients: make(map[key.NodePublic]bool)}
	defer l.forgetAll()
	accepted := false
	for {
		message, err := client.Recv()
		switch {
		case errors.Is(err, net.ErrClosed):
			return errNoMessage
		case err != nil && !accepted && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)):
			// To a server that does not know the key this is a client
			// like any other, which is refused, or may not watch.
			return errMeshKey
		case err != nil:
			return err
		}
		l.silent.Store(false)
		switch message := message.(type) {
		case derp.PeerPresentMessage:
			// One is for this very connection.
			if !accepted {
				accepted = true
				timeout.Stop()
				p.set(func(s *MeshState) { s.Up, s.Since, s.Err = true, time.Now(), nil })
				m.log.Info().Stringer("node", p).Msg("mesh connected")
				pinging, stop := context.WithCancel(ctx)
				defer stop()
				go l.pingEvery(pinging, m.config.PingEvery)
			}
			// Nobody sends to a node of the mesh.
			if message.Flags&derp.PeerPresentIsMeshPeer == 0 {
				l.add(message.Key)
			}
		case derp.PeerGoneMessage:
			// Another reason is about one packet, and may be older than
			// the news that the client is there.
			if message.Reason == derp.PeerGoneReasonDisconnected {
				l.forget(message.Peer)
			}
		}
	}
}

func (l *meshLink) add(node key.NodePublic) {
	l.clients[node] = true
	l.server.AddPacketForwarder(node, l)
	l.peer.set(func(s *MeshState) { s.Clients = len(l.clients) })
}

func (l *meshLink) forget(node key.NodePublic) {
	if l.clients[node] {
		delete(l.clients, node)
		l.server.RemovePacketForwarder(node, l)
		l.peer.set(func(s *MeshState) { s.Clients = len(l.clients) })
	}
}

func (l *meshLink) forgetAll() {
	for node := range l.clients {
		l.forget(node)
	}
}

func (p *meshPeer) set(change func(*MeshState)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(&p.state)
}

// pingEvery hangs up when nothing at all comes for one interval, or a ping
// cannot be sent for as long.
func (l *meshLink) pingEvery(ctx context.Context, interval time.Duration) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if l.silent.Swap(true) {
			_ = l.conn.Close()
			return
		}
		stuck := time.AfterFunc(interval, func() { _ = l.conn.Close() })
		err := l.SendPing([8]byte{})
		stuck.Stop()
		if err != nil {
			return // Recv has an error too
		}
	}
}

// dial connects, and checks the certificate: the mesh key goes over this
// connection.
func (n MeshNode) dial(ctx context.Context, roots *x509.CertPool) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, meshTimeout)
	defer cancel()
	config := &tls.Config{ServerName: n.Host, RootCAs: roots, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
	if n.CertHash != "" {
		// As clients check what the map says.
		tlsdial.SetConfigExpectedCertHash(config, strings.ToLower(n.CertHash))
	}
	addr := n.Dial
	if addr == "" {
		addr = n.hostPort()
	}
	return (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", addr)
}

// upgrade makes DERP of an HTTP connection, as clients do.
func upgrade(ctx context.Context, conn net.Conn, p *meshPeer, self key.NodePrivate, meshKey key.DERPMesh) (*derp.Client, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+p.hostPort()+"/derp", http.NoBody)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Upgrade", "DERP")
	req.Header.Set("Connection", "Upgrade")
	if err := req.Write(conn); err != nil {
		return nil, err
	}
	brw := bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn))
	res, err := http.ReadResponse(brw.Reader, req)
	if err != nil {
		return nil, err
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusSwitchingProtocols {
		return nil, fmt.Errorf("it answers %s to a DERP client", res.Status)
	}
	return derp.NewClient(self, conn, brw, logger.Discard, derp.MeshKey(meshKey))
}

// meshPath is where a node tells others how it is to be written into a map.
// Without a token that only the mesh key gives it is a path like any other.
const (
	meshPath        = "/derp/mesh"
	meshTokenHeader = "Derpd-Mesh"
	meshNodeType    = "application/vnd.derpd.node+json"

	// describeTimeout is short: somebody waits for a map.
	describeTimeout = 2 * time.Second
)

func (m *Mesh) serveNode(stranger http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !provesKey(m.config.Key, r.Header.Values(meshTokenHeader)) {
			stranger.ServeHTTP(w, r)
			return
		}
		node, err := m.config.Describe(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", meshNodeType)
		_ = json.NewEncoder(w).Encode(node)
	})
}

// Description is what another node says about itself.
type Description struct {
	Node derpmap.Node // empty when it never said anything
	From string       // the node as the configuration has it
	Err  error        // why it could not be asked now
}

// Descriptions asks the other nodes. One that cannot be asked is described as
// it was before.
func (m *Mesh) Descriptions(ctx context.Context) []Description {
	ctx, cancel := context.WithTimeout(ctx, describeTimeout)
	defer cancel()
	list := make([]Description, len(m.peers))
	var all sync.WaitGroup
	for i, p := range m.peers {
		all.Go(func() {
			node, err := m.describe(ctx, p)
			p.mu.Lock()
			defer p.mu.Unlock()
			if err == nil {
				p.described = node
			}
			list[i] = Description{Node: p.described, From: p.String(), Err: err}
		})
	}
	all.Wait()
	return list
}

func (m *Mesh) describe(ctx context.Context, p *meshPeer) (node derpmap.Node, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+p.hostPort()+meshPath, http.NoBody)
	if err != nil {
		return node, err
	}
	req.Header.Set(meshTokenHeader, meshToken(m.config.Key))
	transport := &http.Transport{
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return p.dial(ctx, m.config.Roots)
		},
		DisableKeepAlives: true,
	}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return node, err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != meshNodeType {
		return node, errors.New("it tells nothing about itself: it has another mesh key, or is no derpd")
	}
	err = json.NewDecoder(io.LimitReader(res.Body, 64<<10)).Decode(&node)
	if err == nil && node.HostName == "" {
		err = errors.New("it tells nothing about itself")
	}
	return node, err
}
