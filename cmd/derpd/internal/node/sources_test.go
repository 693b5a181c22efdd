package node

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"tailscale.com/types/key"

	"derpd/internal/testkit"
	"derpd/internal/testkit/peers"
)

// authority is a real source of admission, with functions that change it.
type authority struct {
	env      []string
	member   key.NodePrivate // member of the network
	newcomer key.NodePrivate // member that never connected while the source was up

	down, up func()
	revoke   func(key.NodePublic)

	// lists is true for a source that returns all nodes at once, so that
	// its last answer covers nodes that never connected.
	lists bool
}

// TestSourcesInReality takes a relay through outages and changes of its source
// of admission. A real client connects after each step.
func TestSourcesInReality(t *testing.T) {
	for name, start := range map[string]func(*testing.T) authority{
		"headscale":  headscaleAuthority,
		"tailscaled": tailscaledAuthority,
		"api":        apiAuthority,
		"key file":   keyFileAuthority,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := start(t)
			env := append(testkit.Environ(t, "DERP_VERIFY_INTERVAL=1s"), a.env...)
			n := begin(t, env)
			stranger := key.NewNode()
			connects := func(private key.NodePrivate) bool {
				return connectAs(t, region(t, parsePolicy(t, n.printed)), private) == nil
			}
			want := func(what string, private key.NodePrivate, admitted bool) {
				t.Helper()
				if got := connects(private); got != admitted {
					t.Errorf("%s: admitted %t, want %t; %s", what, got, admitted, n.health.Report(t.Context()))
				}
			}
			// The list of the API comes only at intervals.
			testkit.Until(t, "the member is admitted", func() bool { return connects(a.member) })
			want("a stranger", stranger, false)

			a.down()
			want("a member, the source is down", a.member, true)
			want("a newcomer, the source is down", a.newcomer, a.lists)
			want("a stranger, the source is down", stranger, false)
			n.stop()
			n = begin(t, env)
			want("a member, the source is down, after a restart", a.member, true)
			want("a stranger, the source is down, after a restart", stranger, false)
			n.stop()
			if !a.lists { // package admit tests the age of a list
				n = begin(t, append(env, "DERP_VERIFY_GRACE=1ns"))
				want("a member, the source is down, after the grace", a.member, false)
				n.stop()
			}

			a.up()
			n = begin(t, env)
			testkit.Until(t, "a newcomer is admitted by a source that is back", func() bool { return connects(a.newcomer) })
			c := testkit.RegionClient(t, region(t, parsePolicy(t, n.printed)), a.member)
			testkit.MustAdmit(t, c)
			began := time.Now()
			a.revoke(a.member.Public())
			gone := make(chan struct{})
			go func() {
				defer close(gone)
				for {
					if _, err := c.Recv(); err != nil {
						return
					}
				}
			}()
			select {
			case <-gone:
				t.Logf("disconnected %s after it was removed", time.Since(began).Round(time.Millisecond))
			case <-time.After(testkit.Patience):
				t.Errorf("a removed node is still connected; %s", n.health.Report(t.Context()))
			}
			want("a removed node", a.member, false)
			want("a newcomer, after another node was removed", a.newcomer, true)
		})
	}
}

// network starts a headscale with two nodes, and returns their private keys.
func network(t *testing.T) (h *peers.Headscale, member, newcomer key.NodePrivate) {
	t.Helper()
	h = peers.NewHeadscale(t)
	h.SetMap(t, peers.StartRelay(t))
	h.Start(t)
	var keys []key.NodePrivate
	for _, name := range []string{"member", "newcomer"} {
		node := peers.StartTailscaled(t, h, name)
		node.Up(t, h.AuthKey(t, "somebody"))
		keys = append(keys, node.PrivateKey(t))
		node.Stop()
	}
	return h, keys[0], keys[1]
}

func headscaleAuthority(t *testing.T) authority {
	h, member, newcomer := network(t)
	return authority{
		env:    []string{"DERP_VERIFY_CLIENT_URL=" + h.VerifyURL()},
		member: member, newcomer: newcomer,
		down: h.Stop, up: func() { h.Start(t) },
		revoke: func(node key.NodePublic) { h.Delete(t, node) },
	}
}

func tailscaledAuthority(t *testing.T) authority {
	h, member, newcomer := network(t)
	asked := peers.StartTailscaled(t, h, "asked")
	asked.Up(t, h.AuthKey(t, "somebody"))
	return authority{
		env:    []string{"DERP_VERIFY_CLIENTS=true", "DERP_TAILSCALED_SOCKET=" + asked.Socket},
		member: member, newcomer: newcomer,
		down: asked.Stop, up: func() { asked.Start(t) },
		revoke: func(node key.NodePublic) { h.Delete(t, node) },
	}
}

func keyFileAuthority(t *testing.T) authority {
	member, newcomer := key.NewNode(), key.NewNode()
	file := filepath.Join(t.TempDir(), "keys")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Error(err)
		}
	}
	both := fmt.Sprintf("%s # member\n%s # newcomer\n", member.Public(), newcomer.Public())
	write(both)
	return authority{
		env:    []string{"DERP_ALLOW_KEYS=" + file},
		member: member, newcomer: newcomer, lists: true,
		// A damaged file would prevent the start, so the file stays
		// good.
		down: func() {}, up: func() { write(both) },
		revoke: func(key.NodePublic) { write(newcomer.Public().String()) },
	}
}

// devicesAPI answers like the list of devices in Tailscale's API
// (https://tailscale.com/api#tag/devices/get/tailnet/{tailnet}/devices).
type devicesAPI struct {
	mu      sync.Mutex
	down    bool
	devices []map[string]any
}

func (d *devicesAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	user, _, _ := r.BasicAuth()
	switch {
	case d.down:
		http.Error(w, "<html>502 Bad Gateway</html>", http.StatusBadGateway)
	case user != "tskey-api-test" || r.URL.Path != "/api/v2/tailnet/-/devices":
		http.Error(w, `{"message":"API token invalid"}`, http.StatusUnauthorized)
	default:
		_ = json.NewEncoder(w).Encode(map[string]any{"devices": d.devices})
	}
}

func apiAuthority(t *testing.T) authority {
	member, newcomer := key.NewNode(), key.NewNode()
	device := func(node key.NodePrivate) map[string]any {
		return map[string]any{"nodeId": "n1", "authorized": true, "nodeKey": node.Public().String(), "keyExpiryDisabled": true}
	}
	d := &devicesAPI{devices: []map[string]any{device(member), device(newcomer)}}
	server := httptest.NewServer(d)
	t.Cleanup(server.Close)
	set := func(f func()) {
		d.mu.Lock()
		defer d.mu.Unlock()
		f()
	}
	return authority{
		env:    []string{"DERP_TAILNET_API_KEY=tskey-api-test", "DERP_TAILNET_API_URL=" + server.URL},
		member: member, newcomer: newcomer, lists: true,
		down: func() { set(func() { d.down = true }) }, up: func() { set(func() { d.down = false }) },
		revoke: func(key.NodePublic) { set(func() { d.devices = d.devices[1:] }) },
	}
}
