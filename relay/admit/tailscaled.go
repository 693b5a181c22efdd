package admit

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
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
	t := newTailscaled(socket, &local.Client{Dial: dialSocket(socket)}, grace)
	return Source{Name: "tailscaled " + socket, Ask: t.ask, Describe: t.described.of}
}

func newTailscaled(socket string, client *local.Client, grace time.Duration) *tailscaled {
	return &tailscaled{socket: socket, client: client, grace: grace, turn: make(chan struct{}, 1)}
}

type tailscaled struct {
	socket string // path
	client *local.Client
	grace  time.Duration

	described descriptions

	turn chan struct{}                    // holds one element while a status is requested
	last atomic.Pointer[tailscaledStatus] // the last status, nil before the first; written in turn
}

// tailscaledStatus is what one status of tailscaled says.
type tailscaledStatus struct {
	asked     time.Time // time of the request
	problem   error     // why "unknown" must not be taken for a refusal
	online    bool      // connected to the control server
	connected time.Time // time of the last status with online set
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
	s := t.last.Load()
	if s == nil || s.problem != nil || time.Since(s.asked) > maxStatusAge {
		var err error
		if s, err = t.newStatus(ctx); err != nil {
			return time.Time{}, err
		}
	}
	if !s.online && time.Since(s.connected) > t.grace {
		return time.Time{}, s.problem
	}
	return s.connected, nil
}

// refuse requires that tailscaled has its whole network map, because every node is
// unknown without the map. It asks a second time after mapDelay.
func (t *tailscaled) refuse(ctx context.Context, node key.NodePublic) (time.Time, error) {
	s, err := t.newStatus(ctx)
	switch {
	case err != nil:
		return time.Time{}, err
	case s.problem != nil:
		return time.Time{}, s.problem
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

// newStatus returns a status that was requested after the call. Callers that wait at
// the same time share one. An error means that ctx ended.
func (t *tailscaled) newStatus(ctx context.Context) (*tailscaledStatus, error) {
	called := time.Now()
	select {
	case t.turn <- struct{}{}:
		defer func() { <-t.turn }() // after a panic too
	case <-ctx.Done():
		return nil, fmt.Errorf("asking tailscaled for its status: %w", ctx.Err())
	}
	if s := t.last.Load(); s != nil && s.asked.After(called) {
		return s, nil
	}
	return t.requestStatus(ctx)
}

// requestStatus requires Online beside Running: after a restart, tailscaled is Running
// with a stored map, which may lack nodes. The caller holds the turn.
func (t *tailscaled) requestStatus(ctx context.Context) (*tailscaledStatus, error) {
	s := &tailscaledStatus{asked: time.Now()}
	status, err := t.client.StatusWithoutPeers(ctx)
	if err != nil && ctx.Err() != nil {
		return nil, t.explainSocket("asking tailscaled for its status", err) // not shared: others may have more time
	}
	s.online = err == nil && status.Self != nil && status.Self.InNetworkMap && status.Self.Online &&
		status.BackendState != ipn.NeedsLogin.String()
	switch before := t.last.Load(); {
	case s.online:
		s.connected = s.asked
	case before != nil:
		s.connected = before.connected
	}
	switch {
	case err != nil:
		s.problem = t.explainSocket("asking tailscaled for its status", err)
	case status.BackendState == "":
		s.problem = errors.New("the status has no state; " + isTailscaled)
	case status.BackendState == ipn.NeedsLogin.String():
		s.problem = fmt.Errorf("tailscaled is not logged in (%s): run tailscale up", status.BackendState)
	case status.BackendState == ipn.Stopped.String():
		s.problem = fmt.Errorf("tailscaled is disconnected (%s): run tailscale up", status.BackendState)
	case status.BackendState != ipn.Running.String():
		s.problem = fmt.Errorf("tailscaled is not connected yet (%s): see tailscale status", status.BackendState)
	case !s.online:
		s.problem = errors.New("tailscaled has no connection to its control server: see tailscale status")
	}
	t.last.Store(s)
	return s, nil
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
