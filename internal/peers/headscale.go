package peers

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"tailscale.com/types/key"
)

// The map comes from the test alone, and neither updates nor versions are
// asked for.
const headscaleConfig = `
server_url: URL
listen_addr: LISTEN
metrics_listen_addr: ""
noise: {private_key_path: DIR/noise.key}
prefixes: {v4: 100.64.0.0/10}
derp: {server: {enabled: false}, urls: [], paths: [DIR/derp.yaml], auto_update_enabled: false}
disable_check_updates: true
database: {type: sqlite, sqlite: {path: DIR/db.sqlite}}
dns: {magic_dns: false, override_local_dns: false}
unix_socket: DIR/socket
`

// Headscale is a headscale of its own for a test.
type Headscale struct {
	*daemon
	URL string // of the control server

	config, derpMap string            // paths
	users           map[string]string // identifiers by name
}

// NewHeadscale prepares a headscale. Its URL is known from now on, so that a
// relay can be told; before Start it needs a map.
func NewHeadscale(t *testing.T) *Headscale {
	t.Helper()
	return NewHeadscaleAt(t, "127.0.0.1")
}

// NewHeadscaleAt is NewHeadscale at another address of this machine, for nodes
// that cannot reach its loopback.
func NewHeadscaleAt(t *testing.T, host string) *Headscale {
	t.Helper()
	program, dir := find(t, "headscale"), shortDir(t)
	listen := net.JoinHostPort(host, freePort(t))
	h := &Headscale{
		URL:     "http://" + listen,
		config:  filepath.Join(dir, "config.yaml"),
		derpMap: filepath.Join(dir, "derp.yaml"),
		users:   make(map[string]string),
	}
	config := strings.NewReplacer("URL", h.URL, "LISTEN", listen, "DIR", dir).Replace(headscaleConfig)
	if err := os.WriteFile(h.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	h.daemon = newDaemon(t, environ(dir), filepath.Join(dir, "log"), program, "--config", h.config, "serve")
	return h
}

// SetMap sets the relays of the nodes, and there are no others: a map as
// `derpd derpmap --format headscale` prints it. Start reads it.
func (h *Headscale) SetMap(t *testing.T, m []byte) {
	t.Helper()
	if err := os.WriteFile(h.derpMap, m, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Start starts it, also again after Stop: at the same URL, with the same nodes.
func (h *Headscale) Start(t *testing.T) {
	t.Helper()
	h.start(t, func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.URL+"/health", nil)
		if err != nil {
			return err
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer func() { _ = res.Body.Close() }()
		if res.StatusCode != http.StatusOK {
			return fmt.Errorf("health is %s", res.Status)
		}
		return nil
	})
}

// VerifyURL is its admission URL.
func (h *Headscale) VerifyURL() string { return h.URL + "/verify" }

// cli runs a command of headscale, and decodes what it prints into v.
func (h *Headscale) cli(t *testing.T, v any, args ...string) {
	t.Helper()
	out := run(t, h.env, h.program, append([]string{"--config", h.config, "--output", "json"}, args...)...)
	if err := json.NewDecoder(bytes.NewReader(out)).Decode(v); err != nil {
		t.Fatalf("headscale %v: %v in\n%s", args, err, out)
	}
}

// AuthKey makes a key by which any number of nodes of a user may join.
func (h *Headscale) AuthKey(t *testing.T, user string) string {
	t.Helper()
	if h.users[user] == "" {
		var created struct{ ID uint64 }
		h.cli(t, &created, "users", "create", user)
		h.users[user] = strconv.FormatUint(created.ID, 10)
	}
	var auth struct{ Key string }
	h.cli(t, &auth, "preauthkeys", "create", "--reusable", "--user", h.users[user])
	return auth.Key
}

// Delete removes the node with the given key from the network.
func (h *Headscale) Delete(t *testing.T, node key.NodePublic) {
	t.Helper()
	h.cli(t, new(any), "nodes", "delete", "--force", "--identifier", h.identifier(t, node))
}

// Expire logs the node with the given key out, but keeps it.
func (h *Headscale) Expire(t *testing.T, node key.NodePublic) {
	t.Helper()
	h.cli(t, new(any), "nodes", "expire", "--identifier", h.identifier(t, node))
}

// identifier is how headscale's commands name the node with the given key.
func (h *Headscale) identifier(t *testing.T, node key.NodePublic) string {
	t.Helper()
	var nodes []struct {
		ID  uint64         `json:"id"`
		Key key.NodePublic `json:"node_key"`
	}
	h.cli(t, &nodes, "nodes", "list")
	for _, n := range nodes {
		if n.Key == node {
			return strconv.FormatUint(n.ID, 10)
		}
	}
	t.Fatalf("headscale has no node %s", node.ShortString())
	return ""
}
