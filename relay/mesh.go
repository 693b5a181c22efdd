package relay

import (
	"context"
	"crypto/x509"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp/derpserver"
	"tailscale.com/types/key"

	"derpd/relay/derpmap"
)

// firstMeshPause and longestMeshPause limit the pause between two attempts. The
// first pause is short, because a node restarts within a second or two. The
// longest pause is short too, because an attempt costs little.
const firstMeshPause, longestMeshPause = 100 * time.Millisecond, 2 * time.Second

// MeshConfig is the configuration of a mesh: the nodes of one region, which
// forward packets to each other.
type MeshConfig struct {
	// Key is the secret that the nodes share. The zero key is no mesh.
	Key key.DERPMesh

	// Nodes are the other nodes. The list may include this node itself, which
	// is recognized by its node key.
	Nodes []MeshNode

	// Roots verify the certificates of the other nodes; nil: the roots of the
	// system.
	Roots *x509.CertPool

	// Describe returns the description of this node for the maps of the other
	// nodes.
	Describe func(context.Context) (derpmap.Node, error)
}

// MeshNode is the address of another node.
type MeshNode struct {
	Host string // name or address to verify, and to send as SNI
	Port int

	// Dial is the host:port to connect to; empty: Host and Port.
	Dial string

	// CertHash is the SHA-256 of a self-signed certificate, in hex; empty: an
	// authority signed the certificate.
	CertHash string
}

// hostPort returns Host and Port as in a URL.
func (n MeshNode) hostPort() string { return net.JoinHostPort(n.Host, strconv.Itoa(n.Port)) }

// String returns the name of the node in logs and metrics.
func (n MeshNode) String() string {
	if n.Dial != "" {
		return n.hostPort() + "/" + n.Dial
	}
	return n.hostPort()
}

// Mesh is the dialing side of a mesh: it connects to the other nodes, and
// forwards packets to their clients. derpserver implements the receiving side.
type Mesh struct {
	config MeshConfig
	self   key.NodePrivate
	server *derpserver.Server
	log    zerolog.Logger
	peers  []*meshPeer

	dialed    func(netip.Addr) // called with the address of each node that was reached; may be nil
	pingEvery time.Duration    // interval between pings
}

// meshPeer is one of the other nodes.
type meshPeer struct {
	MeshNode

	mu        sync.Mutex
	state     MeshState    // guarded by mu
	described derpmap.Node // latest description; guarded by mu
}

// MeshState is the state of the connection to another node.
type MeshState struct {
	Node    string
	Self    bool      // whether the node is this node
	Up      bool      // whether packets to its clients are forwarded
	Since   time.Time // start of the current value of Up
	Clients int       // clients of that node
	Err     error     // latest cause of not being up; nil before the first
}

func newMesh(c Config, server *derpserver.Server) *Mesh {
	m := &Mesh{config: c.Mesh, self: c.PrivateKey, server: server, log: c.Log, pingEvery: meshPingEvery}
	for _, n := range m.config.Nodes {
		m.peers = append(m.peers, &meshPeer{MeshNode: n, state: MeshState{Node: n.String(), Since: time.Now()}})
	}
	return m
}

// Run connects to each of the other nodes, again after each failure, until ctx
// ends.
func (m *Mesh) Run(ctx context.Context) error {
	var all sync.WaitGroup
	for _, p := range m.peers {
		all.Go(func() { m.keep(ctx, p) })
	}
	all.Wait()
	return nil
}

// States returns the connections to the other nodes, in the order of the
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

// keep connects to one node until ctx ends or the node is this node.
func (m *Mesh) keep(ctx context.Context, p *meshPeer) {
	pause := firstMeshPause
	for first := true; ; first = false {
		err := m.link(ctx, p)
		if ctx.Err() != nil {
			return
		}
		lost := p.down(err)
		switch {
		case errors.Is(err, errSelf):
			m.log.Info().Stringer("node", p).Msg("mesh entry is this node itself")
			return
		case lost:
			pause = firstMeshPause
			m.log.Warn().Stringer("node", p).Err(err).Msg("mesh connection lost")
		case first:
			m.log.Warn().Stringer("node", p).Err(err).Msg("mesh connection failed; retrying")
		}
		// The random part keeps two disconnected nodes from dialing each other
		// at the same time.
		if !sleep(ctx, pause/2+rand.N(pause)) {
			return
		}
		pause = longerPause(pause)
	}
}

// longerPause returns the pause after the next failure.
func longerPause(pause time.Duration) time.Duration { return min(2*pause, longestMeshPause) }

// down notes the end of a connection. It reports whether the node was up.
func (p *meshPeer) down(err error) (lost bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	lost = p.state.Up
	if lost {
		p.state.Since = time.Now()
	}
	p.state.Up, p.state.Err, p.state.Self = false, err, errors.Is(err, errSelf)
	return lost
}

// set changes the state of the connection.
func (p *meshPeer) set(change func(*MeshState)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(&p.state)
}

// sleep waits for d. It returns false if ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
