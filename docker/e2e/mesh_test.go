//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// mesh has two nodes in one region and two clients. Each client reaches only one of
// the nodes, so the nodes have to forward packets to each other.
func mesh(t *testing.T, r *row) {
	w := newWorld(t, r)
	own := newAuthority(t)
	own.saveRoot(w, "roots/roots.pem")
	w.networks["between"] = closed
	const name1, name2 = "derp1.example.test", "derp2.example.test"
	describe := func(service, key string) {
		name, near := name1, "a"
		if service != "relay" {
			name, near = name2, "b"
		}
		w.addRelay(manualRelay(w, relay{
			name: service, hostName: name, on: []string{near, "between"},
			env: map[string]string{
				"DERP_MESH_WITH": name1 + "," + name2, "DERP_MESH_KEY": key,
				"DERP_CA_ROOTS": "/etc/roots/roots.pem",
			},
			volumes: []string{filepath.Join(w.dir, "roots") + ":/etc/roots:ro"},
		}))
	}
	connected := func(service string) {
		t.Helper()
		w.eventually(service+" to be connected to the other", func() error {
			if out, err := w.tryExec(service, "/derpd", "healthcheck"); err != nil || !strings.Contains(out, "1 of 1 nodes connected") {
				return errors.Join(err, errors.New(out))
			}
			return nil
		})
	}
	// The health of a node names the cause when the other one refuses its key.
	refused := func(service string) {
		t.Helper()
		w.eventually(service+" to be refused by the other", func() error {
			out, _ := w.tryExec(service, "/derpd", "healthcheck")
			if !strings.Contains(out, "0 of 1 nodes connected") || !strings.Contains(out, "mesh key") {
				return fmt.Errorf("health: %s", out)
			}
			return nil
		})
	}
	services := []string{"relay", "relay-two"}
	own.issue(w, name1, name1, time.Hour)
	own.issue(w, name2, name2, time.Hour)
	const oldKey, newKey = "the first secret of both nodes", "the second secret of both nodes"
	for _, service := range services {
		describe(service, oldKey)
	}
	w.start(services...)
	for _, service := range services {
		connected(service)
	}
	printed := w.headscaleMap("relay")
	// A comment in each map names the node that printed it.
	comments := regexp.MustCompile("(?m)^#.*\n")
	if other := w.headscaleMap("relay-two"); comments.ReplaceAllString(other, "") != comments.ReplaceAllString(printed, "") {
		t.Errorf("the nodes print different maps:\n%s\n%s", printed, other)
	}
	w.startControl(printed)
	w.join("a", "b")
	w.carries(900, "derpd")

	transfer := w.begin("a", "b")
	w.kill(w.process("relay-two"))
	end := transfer.finish()
	connected("relay-two")
	w.saw("one node killed: packets arrive again after %.1f s", end.TCPSilence)

	// A node with the new key and one with the old key refuse each other.
	describe("relay", newKey)
	w.start("relay")
	for _, service := range services {
		refused(service)
	}
	w.unreachable("a", "b")

	// When every node has the new key, packets arrive again.
	describe("relay-two", newKey)
	w.start("relay-two")
	for _, service := range services {
		connected(service)
	}
	w.pings("a", "b", "derpd")
	w.pings("b", "a", "derpd")
	w.saw("forwards again after a change of the key: %s", w.copies("b", "a"))

	// A node that still has the old key is refused.
	describe("relay-two", oldKey)
	w.start("relay-two")
	for _, service := range services {
		refused(service)
	}
	w.unreachable("a", "b")
	w.unreachable("b", "a")
	w.saw("the old key is refused")
}
