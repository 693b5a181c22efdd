//go:build e2e

package e2e

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tailscale.com/types/key"
)

// admitHeadscale is a relay that admits the nodes of a headscale.
func admitHeadscale(t *testing.T, r *row) {
	w := newWorld(t, r)
	w.addRelay(relay{name: "relay", hostName: relayName, env: map[string]string{
		"DERP_DOMAIN": relayName, "DERP_CERT_MODE": "pinned",
		"DERP_VERIFY_CLIENT_URL": "http://headscale:8080/verify", "DERP_VERIFY_INTERVAL": "1s",
	}})
	w.start("relay")
	w.startControl(w.headscaleMap("relay"))
	w.join("a", "b")
	w.carries(900, "derpd")
	// The relay ends the connection. The node itself would keep it.
	gone := w.status("b").Self.PublicKey.String()
	w.remove("b")
	removed := time.Now()
	w.eventually("b to be disconnected", func() error {
		if log := w.must(t, "logs", "--no-color", "relay"); !strings.Contains(log, "node disconnected: no source admits it any longer") {
			return errors.New("the relay has not logged it")
		}
		return nil
	})
	w.saw("removed node disconnected after %.1f s", time.Since(removed).Seconds())
	w.refused(gone)
	// A node that was never admitted.
	w.refused(key.NewNode().Public().String())
}

// admitKeys is a relay that admits the keys in a file.
func admitKeys(t *testing.T, r *row) {
	w := newWorld(t, r)
	// The key of another node, because the nodes have no keys yet.
	list := filepath.Dir(w.write("certs/keys", key.NewNode().Public().String()+"\n"))
	w.addNode("unknown", "b")
	w.addRelay(relay{
		name: "relay", hostName: relayName,
		env: map[string]string{
			"DERP_DOMAIN": relayName, "DERP_CERT_MODE": "pinned",
			"DERP_ALLOW_KEYS": "/etc/derpd/keys",
		},
		volumes: []string{list + ":/etc/derpd:ro"},
	})
	w.start("relay")
	w.startControl(w.headscaleMap("relay"))
	w.join("a", "b", "unknown")
	keyOf := func(node string) string { return w.status(node).Self.PublicKey.String() }
	w.replace("certs/keys", keyOf("a")+" # a\n"+keyOf("b")+"\n")
	w.carries(900, "derpd")
	// STUN answers a node that is not admitted, DERP does not.
	w.sees("unknown", 900)
	w.unreachable("a", "unknown")
	w.unreachable("unknown", "a")

	w.replace("certs/keys", keyOf("a")+"\n")
	removed := time.Now()
	address := w.address("b")
	w.eventually("b to be cut off", func() error {
		if _, err := w.ping("a", address); err == nil {
			return errors.New("a still reaches b")
		}
		return nil
	})
	w.saw("unknown node unreachable, removed node cut off after %.1f s", time.Since(removed).Seconds())
	w.refused(keyOf("b"))
	w.refused(keyOf("unknown"))
}

// refused waits until `derpd admit` prints that the relay refuses this key.
func (w *world) refused(node string) {
	w.t.Helper()
	w.eventually("the relay to refuse "+node, func() error {
		out, _ := w.tryExec("relay", "/derpd", "admit", node)
		if !strings.Contains(out, "refused: every source says no") {
			return errors.New(out)
		}
		return nil
	})
}
