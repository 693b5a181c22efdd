package admit

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	tailscale "tailscale.com"
	"tailscale.com/client/local"
	"tailscale.com/ipn"
	"tailscale.com/types/key"
)

// mapDelay is how long a tailscaled that is connected to its control server may
// take to apply the first map of the network that it gets from there.
const mapDelay = 500 * time.Millisecond

// statusFor is how long the state of a tailscaled is taken for the present one,
// when it says yes. Before a no it is always looked at.
const statusFor = time.Second

// Tailscaled admits the nodes that the tailscaled behind the unix socket knows
// (derper's --verify-clients). The socket may appear later: until then nobody
// is admitted by it. While tailscaled has no connection to its control server,
// it learns of no node that was removed: what it knew when it had one counts
// for the grace, and no longer.
func Tailscaled(socket string, grace time.Duration) Source {
	t := &tailscaled{client: &local.Client{Socket: socket, UseSocketOnly: true}, grace: grace}
	return Source{Name: "tailscaled " + socket, Ask: t.ask}
}

type tailscaled struct {
	client *local.Client
	grace  time.Duration

	mu        sync.Mutex
	looked    time.Time // at its state; guarded by mu
	state     error     // why it may not know its network, as looked at; guarded by mu
	connected time.Time // when it last knew its network; guarded by mu
}

func (t *tailscaled) ask(ctx context.Context, node key.NodePublic, _ netip.Addr) (time.Time, error) {
	_, err := t.client.WhoIsNodeKey(ctx, node)
	maxAge := statusFor
	if err != nil {
		maxAge = 0
	}
	asOf, state := t.network(ctx, maxAge)
	if errors.Is(err, local.ErrPeerNotFound) {
		// It says so of everybody, too, while it has no map of its network.
		if state != nil {
			return time.Time{}, state
		}
		select {
		case <-ctx.Done():
			return time.Time{}, ctx.Err()
		case <-time.After(mapDelay):
		}
		_, err = t.client.WhoIsNodeKey(ctx, node)
	}
	switch {
	case err == nil && state != nil && time.Since(asOf) > t.grace:
		return time.Time{}, state
	case err == nil:
		return asOf, nil
	case errors.Is(err, local.ErrPeerNotFound):
		return asOf, ErrRefused
	case strings.Contains(err.Error(), "invalid 'addr' parameter"):
		// tailscale/tailscale#12617
		return time.Time{}, tooOld(ctx, t.client)
	}
	return time.Time{}, fmt.Errorf("asking tailscaled: %w", err)
}

// network returns when tailscaled last knew its network, and why it may not
// know it now, as of at most maxAge ago.
func (t *tailscaled) network(ctx context.Context, maxAge time.Duration) (connected time.Time, state error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now := time.Now(); t.state != nil || now.Sub(t.looked) > maxAge {
		t.looked, t.state = now, knowsNetwork(ctx, t.client)
		if t.state == nil {
			t.connected = now
		}
	}
	return t.connected, t.state
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
