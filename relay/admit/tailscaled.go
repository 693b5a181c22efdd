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
	looked    time.Time // at its status; guarded by mu
	trouble   error     // why its no is no no, as looked at; guarded by mu
	online    bool      // whether it had a connection to its control server, as looked at; guarded by mu
	connected time.Time // when it last had one; guarded by mu
}

func (t *tailscaled) ask(ctx context.Context, node key.NodePublic, _ netip.Addr) (time.Time, error) {
	_, err := t.client.WhoIsNodeKey(ctx, node)
	switch {
	case err == nil:
		return t.yes(ctx)
	case errors.Is(err, local.ErrPeerNotFound):
		return t.no(ctx, node)
	case strings.Contains(err.Error(), "invalid 'addr' parameter"):
		// tailscale/tailscale#12617
		return time.Time{}, tooOld(ctx, t.client)
	}
	return time.Time{}, fmt.Errorf("asking tailscaled: %w", err)
}

// yes asks for no more than a connection to the control server: where this
// relay is the only one, tailscaled is not running before it may use it.
func (t *tailscaled) yes(ctx context.Context) (time.Time, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.look(ctx, statusFor)
	if !t.online && time.Since(t.connected) > t.grace {
		return time.Time{}, t.trouble
	}
	return t.connected, nil
}

// no is a no only from a tailscaled that knows its whole network: until then it
// finds nobody.
func (t *tailscaled) no(ctx context.Context, node key.NodePublic) (time.Time, error) {
	t.mu.Lock()
	t.look(ctx, 0)
	trouble := t.trouble
	t.mu.Unlock()
	if trouble != nil {
		return time.Time{}, trouble
	}
	select {
	case <-ctx.Done():
		return time.Time{}, ctx.Err()
	case <-time.After(mapDelay):
	}
	_, err := t.client.WhoIsNodeKey(ctx, node)
	switch {
	case err == nil:
		return time.Now(), nil
	case errors.Is(err, local.ErrPeerNotFound):
		return time.Now(), ErrRefused
	}
	return time.Time{}, fmt.Errorf("asking tailscaled: %w", err)
}

// look asks for the status, unless it was fine at most maxAge ago. After a
// restart tailscaled calls itself running by a map that it has kept, in which
// nodes can be missing, before it has the whole one from its control server.
// mu must be held.
func (t *tailscaled) look(ctx context.Context, maxAge time.Duration) {
	now := time.Now()
	if t.trouble == nil && now.Sub(t.looked) <= maxAge {
		return
	}
	status, err := t.client.StatusWithoutPeers(ctx)
	t.looked, t.trouble = now, nil
	t.online = err == nil && status.Self != nil && status.Self.InNetworkMap && status.Self.Online &&
		status.BackendState != ipn.NeedsLogin.String()
	if t.online {
		t.connected = now
	}
	switch {
	case err != nil:
		t.trouble = fmt.Errorf("asking tailscaled for its status: %w", err)
	case status.BackendState == ipn.NeedsLogin.String():
		t.trouble = fmt.Errorf("tailscaled is not logged in (%s): run tailscale up", status.BackendState)
	case status.BackendState == ipn.Stopped.String():
		t.trouble = fmt.Errorf("tailscaled is disconnected (%s): run tailscale up", status.BackendState)
	case status.BackendState != ipn.Running.String():
		t.trouble = fmt.Errorf("tailscaled is not connected yet (%s): see tailscale status", status.BackendState)
	case !t.online:
		t.trouble = errors.New("tailscaled has no connection to its control server: see tailscale status")
	}
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
