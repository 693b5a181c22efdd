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

// mapDelay is the time that tailscaled may need to apply the first network map
// after it has connected to its control server.
const mapDelay = 500 * time.Millisecond

// maxStatusAge is the age up to which a status may admit a node. Only a new status
// may refuse one.
const maxStatusAge = time.Second

// Tailscaled returns a source that admits the nodes known to the tailscaled
// behind a unix socket (derper's --verify-clients). The source is unavailable
// until the socket exists. Without a connection to its control server,
// tailscaled does not learn which nodes were removed, so its answers then count
// only for the grace.
func Tailscaled(socket string, grace time.Duration) Source {
	t := &tailscaled{socket: socket, client: &local.Client{Dial: dialSocket(socket)}, grace: grace}
	return Source{Name: "tailscaled " + socket, Ask: t.ask, Describe: t.described.of}
}

type tailscaled struct {
	socket string // path
	client *local.Client
	grace  time.Duration

	described descriptions

	mu        sync.Mutex
	asked     time.Time // time of the last status; guarded by mu
	problem   error     // why "unknown" must not be taken for a refusal; from the last status; guarded by mu
	online    bool      // connected to the control server; from the last status; guarded by mu
	connected time.Time // time of the last status with online set; guarded by mu
}

func (t *tailscaled) ask(ctx context.Context, node key.NodePublic, _ netip.Addr) (time.Time, error) {
	who, err := t.client.WhoIsNodeKey(ctx, node)
	switch {
	case err == nil:
		t.described.keep(node, who.Node)
		return t.admit(ctx)
	case errors.Is(err, local.ErrPeerNotFound):
		t.described.forget(node)
		return t.refuse(ctx, node)
	case strings.Contains(err.Error(), "invalid 'addr' parameter"):
		// tailscale/tailscale#12617
		return time.Time{}, tooOld(ctx, t.client)
	}
	return time.Time{}, t.explainSocket("asking tailscaled", err)
}

// admit only requires that tailscaled has reached its control server. It cannot
// require state Running: if this is the only relay, tailscaled gets there only
// after it was admitted.
func (t *tailscaled) admit(ctx context.Context) (time.Time, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.updateStatus(ctx, maxStatusAge)
	if !t.online && time.Since(t.connected) > t.grace {
		return time.Time{}, t.problem
	}
	return t.connected, nil
}

// refuse requires that tailscaled has its whole network map, because every node is
// unknown without the map. It asks a second time after mapDelay.
func (t *tailscaled) refuse(ctx context.Context, node key.NodePublic) (time.Time, error) {
	if problem := t.newProblem(ctx); problem != nil {
		return time.Time{}, problem
	}
	select {
	case <-ctx.Done():
		return time.Time{}, ctx.Err()
	case <-time.After(mapDelay):
	}
	who, err := t.client.WhoIsNodeKey(ctx, node)
	switch {
	case err == nil:
		t.described.keep(node, who.Node)
		return time.Now(), nil
	case errors.Is(err, local.ErrPeerNotFound):
		return time.Now(), ErrRefused
	}
	return time.Time{}, t.explainSocket("asking tailscaled", err)
}

// newProblem returns the problem of a new status.
func (t *tailscaled) newProblem(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock() // after a panic too
	t.updateStatus(ctx, 0)
	return t.problem
}

// updateStatus requests a status if the last one has a problem or is older than
// maxAge. It requires Online beside Running: after a restart, tailscaled is Running
// with a stored map, which may lack nodes. mu must be held.
func (t *tailscaled) updateStatus(ctx context.Context, maxAge time.Duration) {
	now := time.Now()
	if t.problem == nil && now.Sub(t.asked) <= maxAge {
		return
	}
	status, err := t.client.StatusWithoutPeers(ctx)
	t.asked, t.problem = now, nil
	t.online = err == nil && status.Self != nil && status.Self.InNetworkMap && status.Self.Online &&
		status.BackendState != ipn.NeedsLogin.String()
	if t.online {
		t.connected = now
	}
	switch {
	case err != nil:
		t.problem = t.explainSocket("asking tailscaled for its status", err)
	case status.BackendState == "":
		t.problem = errors.New("the status has no state; " + isTailscaled)
	case status.BackendState == ipn.NeedsLogin.String():
		t.problem = fmt.Errorf("tailscaled is not logged in (%s): run tailscale up", status.BackendState)
	case status.BackendState == ipn.Stopped.String():
		t.problem = fmt.Errorf("tailscaled is disconnected (%s): run tailscale up", status.BackendState)
	case status.BackendState != ipn.Running.String():
		t.problem = fmt.Errorf("tailscaled is not connected yet (%s): see tailscale status", status.BackendState)
	case !t.online:
		t.problem = errors.New("tailscaled has no connection to its control server: see tailscale status")
	}
}

// tooOld returns an error that names both versions. tailscaled answers questions
// about node keys since 1.70.
func tooOld(ctx context.Context, client *local.Client) error {
	status, err := client.StatusWithoutPeers(ctx)
	if err != nil {
		return fmt.Errorf("tailscaled is too old to be asked about node keys (and for its status: %w); update it", err)
	}
	theirs, _, _ := strings.Cut(status.Version, "-")
	return fmt.Errorf("tailscaled %s cannot be asked about node keys, which needs 1.70: update it to %s, the version of this relay",
		theirs, strings.TrimSpace(tailscale.VersionDotTxt))
}
