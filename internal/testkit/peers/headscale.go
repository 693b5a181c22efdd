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

	"derpd/internal/testkit"
)

// headscaleConfig takes the DERP map from the test alone. It disables requests for
// updates and versions.
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

// Headscale is a headscale with a new database.
type Headscale struct {
	*daemon
	URL string // URL of the control server

	config, derpMap string            // paths of the two files
	users           map[string]string // headscale's identifiers, by the user's name
}

// NewHeadscale prepares a headscale. The URL is set at once, for the configuration of
// a relay. Start needs a map: see SetMap.
func NewHeadscale(t testing.TB) *Headscale {
	t.Helper()
	return NewHeadscaleAt(t, "127.0.0.1")
}

// NewHeadscaleAt is NewHeadscale on another address of this machine, for nodes
// that cannot reach its loopback addresses.
func NewHeadscaleAt(t testing.TB, host string) *Headscale {
	t.Helper()
	program, dir := Program(t, "headscale"), shortDir(t)
	listen := net.JoinHostPort(host, strconv.Itoa(testkit.FreePort(t)))
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

// SetMap sets the DERP map of all nodes, in the format of `derpd derpmap
// --format headscale`. Start reads the map.
func (h *Headscale) SetMap(t testing.TB, m []byte) {
	t.Helper()
	if err := os.WriteFile(h.derpMap, m, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Start starts headscale. After Stop, headscale has the same URL and nodes.
func (h *Headscale) Start(t testing.TB) {
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

// VerifyURL is the admission URL of headscale.
func (h *Headscale) VerifyURL() string { return h.URL + "/verify" }

// cli runs a command of headscale, and decodes its output into v.
func (h *Headscale) cli(t testing.TB, v any, args ...string) {
	t.Helper()
	out := run(t, h.env, h.program, append([]string{"--config", h.config, "--output", "json"}, args...)...)
	if err := json.NewDecoder(bytes.NewReader(out)).Decode(v); err != nil {
		t.Fatalf("headscale %v: %v in\n%s", args, err, out)
	}
}

// AuthKey makes a key with which any number of a user's nodes can join.
func (h *Headscale) AuthKey(t testing.TB, user string) string {
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
func (h *Headscale) Delete(t testing.TB, node key.NodePublic) {
	t.Helper()
	h.cli(t, new(any), "nodes", "delete", "--force", "--identifier", h.identifier(t, node))
}

// Expire ends the login of the node with the given key. The node stays in the
// network's list.
func (h *Headscale) Expire(t testing.TB, node key.NodePublic) {
	t.Helper()
	h.cli(t, new(any), "nodes", "expire", "--identifier", h.identifier(t, node))
}

// identifier is the number of a node in headscale's commands.
func (h *Headscale) identifier(t testing.TB, node key.NodePublic) string {
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
