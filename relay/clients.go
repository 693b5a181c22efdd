package relay

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/derp/derpserver"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// rewatchAfter is the pause before the next watch.
const rewatchAfter = time.Second

// clients is the list of connected nodes. Only mesh peers may list clients and
// close their connections. For this reason clients connects to derpserver as a
// mesh peer, over an in-process pipe.
type clients struct {
	server *derpserver.Server
	log    zerolog.Logger

	mu        sync.Mutex
	connected map[key.NodePublic]netip.Addr // address of the latest connection; guarded by mu
	peer      *derp.Client                  // nil without a watch; guarded by mu
}

// run updates the list until ctx ends.
func (c *clients) run(ctx context.Context) error {
	for {
		err := c.watch(ctx)
		if ctx.Err() != nil {
			return nil
		}
		c.log.Warn().Err(err).Msg("list of clients lost; requesting it again")
		if !sleep(ctx, rewatchAfter) {
			return nil
		}
	}
}

// watch updates the list over one pipe.
func (c *clients) watch(ctx context.Context) error {
	ours, theirs := net.Pipe()
	served := make(chan struct{})
	go func() {
		defer close(served)
		c.server.Accept(ctx, theirs, bufio.NewReadWriter(bufio.NewReader(theirs), nil), "127.0.0.1:0")
	}()
	defer func() {
		_ = ours.Close()
		<-served
	}()
	defer context.AfterFunc(ctx, func() { _ = ours.Close() })()

	peer, err := derp.NewClient(key.NewNode(), ours, bufio.NewReadWriter(bufio.NewReader(ours), bufio.NewWriter(ours)),
		logger.Discard, derp.MeshKey(c.server.MeshKey()))
	if err != nil {
		return err
	}
	// Concurrent with Recv below. The server writes before it reads, and a pipe
	// has no buffer.
	var request sync.WaitGroup
	request.Go(func() {
		if err := peer.WatchConnectionChanges(); err != nil {
			_ = ours.Close()
		}
	})
	defer func() {
		_ = ours.Close()
		request.Wait()
	}()
	c.mu.Lock()
	c.connected, c.peer = make(map[key.NodePublic]netip.Addr), peer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		c.peer = nil
		c.mu.Unlock()
	}()
	for {
		message, err := peer.Recv()
		if err != nil {
			return err
		}
		c.mu.Lock()
		switch m := message.(type) {
		case derp.PeerPresentMessage:
			if m.Flags&derp.PeerPresentIsMeshPeer == 0 {
				c.connected[m.Key] = m.IPPort.Addr()
			}
		case derp.PeerGoneMessage:
			delete(c.connected, m.Peer)
		}
		c.mu.Unlock()
	}
}

// list returns a copy of the list.
func (c *clients) list() map[key.NodePublic]netip.Addr {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.connected)
}

// disconnect closes every connection of a node.
func (c *clients) disconnect(node key.NodePublic) error {
	c.mu.Lock()
	peer := c.peer
	c.mu.Unlock()
	if peer == nil {
		return errors.New("the list of clients is not complete yet")
	}
	if err := peer.ClosePeer(node); err != nil {
		return fmt.Errorf("disconnecting %s: %w", node.ShortString(), err)
	}
	return nil
}
