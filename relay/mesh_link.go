package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"tailscale.com/derp"
	"tailscale.com/derp/derpserver"
	"tailscale.com/types/key"
)

const (
	// meshTimeout limits a connect, up to the reply to the mesh key.
	meshTimeout = 10 * time.Second

	// meshPingEvery is the interval between pings. Without pings, a vanished
	// node would stay up, and packets to its clients would be lost.
	meshPingEvery = 5 * time.Second
)

var (
	errSelf    = errors.New("the node is this node itself")
	errMeshKey = errors.New("the node closed the connection after the mesh key: it has another key, or is stopping")
	errSilent  = errors.New("the node stopped answering")
)

// meshLink is one connection to another node. derpserver forwards packets over
// this connection. A meshLink never reconnects: while there is no connection,
// derpserver drops packets for the node at once, and notifies the sender.
type meshLink struct {
	*derp.Client
	peer   *meshPeer
	server *derpserver.Server
	hangUp func(error) // closes the connection
	silent atomic.Bool // whether no message came since the latest ping

	clients map[key.NodePublic]bool // of that node; owned by link
}

// String returns the name of the node, for derpserver's log.
func (l *meshLink) String() string { return l.peer.String() }

// link connects to a node, and returns when the connection has ended.
func (m *Mesh) link(ctx context.Context, p *meshPeer) error {
	conn, err := p.dial(ctx, m.config.Roots)
	if err != nil {
		return err
	}
	if m.dialed != nil {
		m.dialed(addrPort(conn.RemoteAddr()).Addr())
	}
	// The end of ctx closes the connection. The cause of ctx is then returned,
	// because the error of a closed connection varies.
	ctx, hangUp := context.WithCancelCause(ctx)
	defer hangUp(nil)
	context.AfterFunc(ctx, func() { _ = conn.Close() })
	err = m.receive(ctx, hangUp, p, conn)
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// receive runs one connection until it ends.
func (m *Mesh) receive(ctx context.Context, hangUp func(error), p *meshPeer, conn net.Conn) error {
	timeout := time.AfterFunc(meshTimeout, func() { hangUp(errSilent) })
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
	l := &meshLink{Client: client, peer: p, server: m.server, hangUp: hangUp, clients: make(map[key.NodePublic]bool)}
	defer l.forgetAll()
	admitted, accepted := false, false
	for {
		message, err := client.Recv()
		if err != nil {
			if !accepted && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)) {
				// A server with another key treats this node as an ordinary
				// client: it refuses the client, or the request to watch.
				return errMeshKey
			}
			return err
		}
		switch message.(type) {
		case derp.ServerInfoMessage:
			admitted = true
		case derp.HealthMessage:
			// derpd holds the connection of a client that it refuses; see [teller].
			if !admitted {
				return errMeshKey
			}
		}
		// The first PeerPresentMessage is about this connection itself.
		if _, ok := message.(derp.PeerPresentMessage); ok && !accepted {
			accepted = true
			timeout.Stop()
			p.set(func(s *MeshState) { s.Up, s.Since, s.Err = true, time.Now(), nil })
			m.log.Info().Stringer("node", p).Msg("mesh connected")
			go l.pingEvery(ctx, m.pingEvery)
		}
		l.handle(message)
	}
}

// handle updates the clients of the node.
func (l *meshLink) handle(message derp.ReceivedMessage) {
	l.silent.Store(false)
	switch message := message.(type) {
	case derp.PeerPresentMessage:
		// Clients send no packets to the nodes of a mesh.
		if message.Flags&derp.PeerPresentIsMeshPeer == 0 {
			l.add(message.Key)
		}
	case derp.PeerGoneMessage:
		// Any other reason is about one packet, which may be older than the
		// connection of the client.
		if message.Reason == derp.PeerGoneReasonDisconnected {
			l.forget(message.Peer)
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

// pingEvery sends pings. It closes the connection after an interval without a
// message, and when sending a ping takes an interval.
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
			l.hangUp(errSilent)
			return
		}
		stuck := time.AfterFunc(interval, func() { l.hangUp(errSilent) })
		err := l.SendPing([8]byte{})
		stuck.Stop()
		if err != nil {
			return // Recv fails too
		}
	}
}
