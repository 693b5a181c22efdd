package peers

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"tailscale.com/client/local"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/types/key"
)

// Tailscaled is a tailscaled of its own for a test, beside the network of this
// machine.
type Tailscaled struct {
	*daemon
	Socket string // of its local API
	Client *local.Client

	dir       string // of its state
	cli       string // path of tailscale
	headscale *Headscale
	hostname  string
}

// StartTailscaled starts a tailscaled for the network of h, in which it is only
// after Up.
func StartTailscaled(t *testing.T, h *Headscale, hostname string) *Tailscaled {
	t.Helper()
	program, cli, dir := find(t, "tailscaled"), find(t, "tailscale"), shortDir(t)
	socket := filepath.Join(dir, "socket")
	n := &Tailscaled{
		Socket: socket, Client: &local.Client{Socket: socket, UseSocketOnly: true},
		dir: dir, cli: cli, headscale: h, hostname: hostname,
	}
	n.daemon = newDaemon(t,
		environ(dir,
			"TS_LOGS_DIR="+dir,
			"TS_ASSUME_NETWORK_UP_FOR_TEST=1", // or it waits where there is only loopback
			"TS_DISABLE_PORTMAPPER=1",         // which would ask the router
			"TS_DEBUG_NEVER_DIRECT_UDP=1",     // or nodes on one machine need no relay
			"TS_PANIC_IF_HIT_MAIN_CONTROL=1",
		),
		filepath.Join(dir, "log"), program,
		"--tun=userspace-networking", "--port=0", "--socket="+socket, "--statedir="+dir,
		"--encrypt-state=false", "--no-logs-no-support")
	n.Start(t)
	return n
}

// Start starts it again after Stop, with the state that it had.
func (n *Tailscaled) Start(t *testing.T) {
	t.Helper()
	n.start(t, func(ctx context.Context) error {
		_, err := n.Client.StatusWithoutPeers(ctx)
		return err
	})
}

// Run runs a command of tailscale, and returns what it prints.
func (n *Tailscaled) Run(t *testing.T, args ...string) []byte {
	t.Helper()
	return run(t, n.env, n.cli, append([]string{"--socket=" + n.Socket}, args...)...)
}

// Up logs in with a key of headscale, and waits until it is connected.
func (n *Tailscaled) Up(t *testing.T, authKey string) {
	t.Helper()
	n.Run(t, "up", "--login-server="+n.headscale.URL, "--auth-key="+authKey, "--hostname="+n.hostname, "--accept-dns=false")
}

// Logout leaves the network and forgets the node key.
func (n *Tailscaled) Logout(t *testing.T) {
	t.Helper()
	n.Run(t, "logout")
}

// Status is what `tailscale status` tells.
func (n *Tailscaled) Status(t *testing.T) *ipnstate.Status {
	t.Helper()
	status, err := n.Client.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return status
}

// NodeKey is the key by which others know it.
func (n *Tailscaled) NodeKey(t *testing.T) key.NodePublic {
	t.Helper()
	return n.Status(t).Self.PublicKey
}

// PrivateKey is the node's own key, as it keeps it on disk: with it a test can
// be this node, once it is stopped.
func (n *Tailscaled) PrivateKey(t *testing.T) key.NodePrivate {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(n.dir, "tailscaled.state"))
	if err != nil {
		t.Fatal(err)
	}
	var state map[string][]byte // base64, of JSON or of a name
	if err := json.Unmarshal(data, &state); err != nil {
		t.Fatal(err)
	}
	var profile struct {
		Config struct{ PrivateNodeKey key.NodePrivate }
	}
	if err := json.Unmarshal(state[string(state["_current-profile"])], &profile); err != nil || profile.Config.PrivateNodeKey.IsZero() {
		t.Fatalf("no key in the state of tailscaled: %v", err)
	}
	return profile.Config.PrivateNodeKey
}
