package relay

import (
	"context"
	"maps"
	"slices"
	"testing"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// The relay lists the connected nodes, and disconnects one node with all its
// connections and no other.
func TestClients(t *testing.T) {
	ln := listen(t)
	r := start(t, Config{Log: zerolog.Nop()}, ln)
	if err := r.Disconnect(key.NewNode().Public()); err == nil {
		t.Error("disconnected a node without a list")
	}
	// One is connected before the list exists.
	stays, leaves := key.NewNode(), key.NewNode()
	first := connect(t, ln, nil, stays)

	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	others := []*derphttp.Client{connect(t, ln, nil, leaves), connect(t, ln, nil, leaves)}
	awaitClients(t, r, stays.Public(), leaves.Public())
	for node, addr := range r.Clients() {
		if !addr.IsLoopback() {
			t.Errorf("%s is at %s, want a loopback address", node.ShortString(), addr)
		}
	}
	clear(r.Clients()) // a copy
	awaitClients(t, r, stays.Public(), leaves.Public())

	if err := r.Disconnect(leaves.Public()); err != nil {
		t.Fatal(err)
	}
	for _, c := range others {
		for {
			message, err := c.Recv()
			if err != nil {
				break
			}
			if _, ok := message.(derp.ReceivedPacket); ok {
				t.Error("a packet for a disconnected node")
			}
		}
	}
	awaitClients(t, r, stays.Public())
	testkit.Exchange(t, first, connect(t, ln, nil, key.NewNode()))

	cancel()
	if err := testkit.Receive(t, "the end of Run", ended); err != nil {
		t.Error(err)
	}
	if err := r.Disconnect(stays.Public()); err == nil {
		t.Error("disconnected a node without a list")
	}
}

// awaitClients waits until exactly these nodes are listed.
func awaitClients(t *testing.T, r *Relay, want ...key.NodePublic) {
	t.Helper()
	testkit.Until(t, "the list of clients", func() bool {
		got := slices.Collect(maps.Keys(r.Clients()))
		return len(got) == len(want) && !slices.ContainsFunc(want, func(node key.NodePublic) bool { return !slices.Contains(got, node) })
	})
}
