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

// Tailscaled is a tailscaled in user space, which does not change the network of this
// machine.
type Tailscaled struct {
	*daemon
	Socket string // path of the socket of the local API
	Client *local.Client

	dir       string // state directory
	cli       string // path of tailscale
	headscale *Headscale
	hostname  string
}

// StartTailscaled starts a tailscaled for the network of h. The node joins the
// network with Up.
func StartTailscaled(t testing.TB, h *Headscale, hostname string) *Tailscaled {
	t.Helper()
	program, cli, dir := Program(t, "tailscaled"), Program(t, "tailscale"), shortDir(t)
	socket := filepath.Join(dir, "socket")
	n := &Tailscaled{
		Socket: socket, Client: &local.Client{Socket: socket, UseSocketOnly: true},
		dir: dir, cli: cli, headscale: h, hostname: hostname,
	}
	n.daemon = newDaemon(t,
		environ(dir,
			"TS_LOGS_DIR="+dir,
			"TS_ASSUME_NETWORK_UP_FOR_TEST=1", // else tailscaled waits for another interface than loopback
			"TS_DISABLE_PORTMAPPER=1",         // it would ask the router
			"TS_DEBUG_NEVER_DIRECT_UDP=1",     // else nodes on one machine need no relay
			"TS_PANIC_IF_HIT_MAIN_CONTROL=1",
		),
		filepath.Join(dir, "log"), program,
		"--tun=userspace-networking", "--port=0", "--socket="+socket, "--statedir="+dir,
		"--encrypt-state=false", "--no-logs-no-support")
	n.Start(t)
	return n
}

// Start starts tailscaled again after Stop, with the same state.
func (n *Tailscaled) Start(t testing.TB) {
	t.Helper()
	n.start(t, func(ctx context.Context) error {
		_, err := n.Client.StatusWithoutPeers(ctx)
		return err
	})
}

// Run runs a command of tailscale, and returns its output.
func (n *Tailscaled) Run(t testing.TB, args ...string) []byte {
	t.Helper()
	return run(t, n.env, n.cli, append([]string{"--socket=" + n.Socket}, args...)...)
}

// Up logs in with a key of headscale, and returns when the node is connected.
func (n *Tailscaled) Up(t testing.TB, authKey string) {
	t.Helper()
	n.Run(t, "up", "--login-server="+n.headscale.URL, "--auth-key="+authKey, "--hostname="+n.hostname, "--accept-dns=false")
}

// Logout leaves the network and deletes the node key.
func (n *Tailscaled) Logout(t testing.TB) {
	t.Helper()
	n.Run(t, "logout")
}

// Status is the output of `tailscale status`.
func (n *Tailscaled) Status(t testing.TB) *ipnstate.Status {
	t.Helper()
	status, err := n.Client.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return status
}

// NodeKey is the public key of the node.
func (n *Tailscaled) NodeKey(t testing.TB) key.NodePublic {
	t.Helper()
	return n.Status(t).Self.PublicKey
}

// PrivateKey is the private key of the node, read from its state directory.
// With the key a DERP client of the test can take the place of a stopped node.
func (n *Tailscaled) PrivateKey(t testing.TB) key.NodePrivate {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(n.dir, "tailscaled.state"))
	if err != nil {
		t.Fatal(err)
	}
	var state map[string][]byte // values in base64: JSON, or the name of another key
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
