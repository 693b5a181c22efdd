package admit

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	tailscale "tailscale.com"
	"tailscale.com/client/local"
	"tailscale.com/ipn"
	"tailscale.com/types/key"
)

// mapDelay is how long a tailscaled that is connected to its control server may
// take to apply the first map of the network that it gets from there.
const mapDelay = 500 * time.Millisecond

// Tailscaled admits the nodes that the tailscaled behind the unix socket knows
// (derper's --verify-clients). The socket may appear later: until then nobody
// is admitted by it.
func Tailscaled(socket string) Source {
	client := &local.Client{Socket: socket, UseSocketOnly: true}
	return Source{
		Name: "tailscaled " + socket,
		Ask: func(ctx context.Context, node key.NodePublic, _ netip.Addr) (time.Time, error) {
			return time.Now(), askTailscaled(ctx, client, node)
		},
	}
}

func askTailscaled(ctx context.Context, client *local.Client, node key.NodePublic) error {
	_, err := client.WhoIsNodeKey(ctx, node)
	if errors.Is(err, local.ErrPeerNotFound) {
		// It says so of everybody, too, while it has no map of its network.
		if err := knowsNetwork(ctx, client); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(mapDelay):
		}
		_, err = client.WhoIsNodeKey(ctx, node)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, local.ErrPeerNotFound):
		return ErrRefused
	case strings.Contains(err.Error(), "invalid 'addr' parameter"):
		// tailscale/tailscale#12617
		return tooOld(ctx, client)
	}
	return fmt.Errorf("asking tailscaled: %w", err)
}

// knowsNetwork returns why tailscaled may not know all nodes of its network.
// After a restart it calls itself running by a map that it has kept, in which
// nodes can be missing, before it has the whole one from its control server.
func knowsNetwork(ctx context.Context, client *local.Client) error {
	status, err := client.StatusWithoutPeers(ctx)
	switch {
	case err != nil:
		return fmt.Errorf("asking tailscaled for its status: %w", err)
	case status.BackendState == ipn.NeedsLogin.String():
		return fmt.Errorf("tailscaled is not logged in (%s): run tailscale up", status.BackendState)
	case status.BackendState == ipn.Stopped.String():
		return fmt.Errorf("tailscaled is disconnected (%s): run tailscale up", status.BackendState)
	case status.BackendState != ipn.Running.String():
		return fmt.Errorf("tailscaled is not connected yet (%s): see tailscale status", status.BackendState)
	case status.Self == nil || !status.Self.InNetworkMap || !status.Self.Online:
		return errors.New("tailscaled has no connection to its control server: see tailscale status")
	}
	return nil
}

// tooOld names both versions. Node keys can be asked about since 1.70.
func tooOld(ctx context.Context, client *local.Client) error {
	status, err := client.StatusWithoutPeers(ctx)
	if err != nil {
		return fmt.Errorf("tailscaled is too old to be asked about node keys (and for its status: %w); update it", err)
	}
	theirs, _, _ := strings.Cut(status.Version, "-")
	return fmt.Errorf("tailscaled %s cannot be asked about node keys, which came with 1.70: update it to %s, which this relay is made of",
		theirs, strings.TrimSpace(tailscale.VersionDotTxt))
}
