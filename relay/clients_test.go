package relay_test

import (
	"context"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/netmon"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"derpd/relay"
)

// The relay knows who is connected, and can disconnect one node with all its
// connections and no other.
func TestClients(t *testing.T) {
	home, err := relay.Home("blank")
	if err != nil {
		t.Fatal(err)
	}
	r, err := relay.New(relay.Config{PrivateKey: key.NewNode(), Home: home, BootstrapDNS: relay.NewBootstrapDNS(nil, zerolog.Nop()), Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(r.Handler())
	connect := func(private key.NodePrivate) *derphttp.Client {
		t.Helper()
		c, err := derphttp.NewClient(private, server.URL+"/derp", logger.Discard, netmon.NewStatic())
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Connect(t.Context()); err != nil {
			t.Fatal(err)
		}
		if message, err := c.Recv(); err != nil {
			t.Fatalf("%v, %v", message, err)
		}
		return c
	}
	// One is connected before the list is kept.
	stays, leaves := key.NewNode(), key.NewNode()
	clients := []*derphttp.Client{connect(stays)}

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	clients = append(clients, connect(leaves), connect(leaves))
	awaitClients(t, r, stays.Public(), leaves.Public())
	for node, addr := range r.Clients() {
		if !addr.IsLoopback() {
			t.Errorf("%s is at %s, want a loopback address", node.ShortString(), addr)
		}
	}

	if err := r.Disconnect(leaves.Public()); err != nil {
		t.Fatal(err)
	}
	for _, c := range clients[1:] {
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
	if err := clients[0].Send(stays.Public(), []byte("still here")); err != nil {
		t.Error(err)
	}
	for {
		message, err := clients[0].Recv()
		if err != nil {
			t.Fatalf("another node was disconnected too: %v", err)
		}
		if p, ok := message.(derp.ReceivedPacket); ok && string(p.Data) == "still here" {
			break
		}
	}

	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := r.Disconnect(stays.Public()); err == nil {
		t.Error("disconnected a node without a list")
	}
	for _, c := range clients {
		_ = c.Close()
	}
	_ = r.Close()
	server.Close()
}

// awaitClients waits until exactly these nodes are connected.
func awaitClients(t *testing.T, r *relay.Relay, want ...key.NodePublic) {
	t.Helper()
	deadline, tick := time.After(patience), time.NewTicker(time.Millisecond)
	defer tick.Stop()
	var list map[key.NodePublic]netip.Addr
	for {
		list = r.Clients()
		all := len(list) == len(want)
		for _, node := range want {
			_, ok := list[node]
			all = all && ok
		}
		if all {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("connected are %v, want %v", list, want)
		case <-tick.C:
		}
	}
}
