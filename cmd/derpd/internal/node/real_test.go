package node

import (
	"context"
	"errors"
	"testing"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/cmd/derpd/internal/admin"
	"derpd/internal/testkit"
	"derpd/internal/testkit/peers"
)

// TestRealNodes does what a Headscale user does. The printed map goes into a
// real headscale, and headscale admits its nodes to the relay. Two real nodes
// then ping each other, and the relay is their only path.
func TestRealNodes(t *testing.T) {
	h := peers.NewHeadscale(t)
	n := begin(t, testkit.Environ(t, "DERP_REGION_CODE=mine", "DERP_VERIFY_CLIENT_URL="+h.VerifyURL()))
	printed, err := admin.Client{Addr: n.listeners.admin.Addr().String()}.Map(t.Context(), "headscale")
	if err != nil {
		t.Fatal(err)
	}
	h.SetMap(t, printed)
	h.Start(t)
	a, b := peers.StartTailscaled(t, h, "a"), peers.StartTailscaled(t, h, "b")
	for _, node := range []*peers.Tailscaled{a, b} {
		node.Up(t, h.AuthKey(t, "somebody"))
		if home := node.Status(t).Self.Relay; home != "mine" {
			t.Errorf("the home of a node is %q", home)
		}
	}
	for _, kind := range []tailcfg.PingType{tailcfg.PingDisco, tailcfg.PingTSMP} { // TSMP passes WireGuard
		for _, way := range [][2]*peers.Tailscaled{{a, b}, {b, a}} {
			to := way[1].Status(t).TailscaleIPs[0]
			testkit.Wait(t, "an answer to a ping", func(ctx context.Context) error {
				// The first pings are lost while the nodes
				// exchange their keys.
				ctx, cancel := context.WithTimeout(ctx, time.Second)
				defer cancel()
				pong, err := way[0].Client.Ping(ctx, to, kind)
				switch {
				case err != nil:
					return err
				case pong.Err != "":
					return errors.New(pong.Err)
				case kind == tailcfg.PingDisco && pong.DERPRegionCode != "mine":
					t.Errorf("the ping did not go through the relay: %+v", pong)
				}
				return nil
			})
		}
	}
	if err := connectAs(t, region(t, parsePolicy(t, n.printed)), key.NewNode()); err == nil {
		t.Error("a stranger is admitted")
	}
}
