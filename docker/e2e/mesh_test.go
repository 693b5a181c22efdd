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

// mesh has a node of the region for each of two clients, neither of which can
// reach the other's: what one sends, the nodes forward.
func mesh(t *testing.T, r *row) {
	w := newWorld(t, r)
	own := newAuthority(t)
	own.saveRoot(w, "roots/roots.pem")
	w.networks["between"] = closed
	const name1, name2 = "derp1.example.test", "derp2.example.test"
	describe := func(service, keys string) {
		name, near := name1, "a"
		if service != "relay" {
			name, near = name2, "b"
		}
		w.addRelay(manualRelay(w, relay{
			name: service, hostName: name, on: []string{near, "between"},
			env: map[string]string{
				"DERP_MESH_WITH": name1 + "," + name2, "DERP_MESH_KEY": keys,
				"DERP_ACME_CA_ROOTS": "/etc/roots/roots.pem",
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
	services := []string{"relay", "relay-two"}
	own.issue(w, name1, name1, time.Hour)
	own.issue(w, name2, name2, time.Hour)
	const oldKey, newKey = "the secret that both have at first", "another one that comes after it"
	for _, service := range services {
		describe(service, oldKey)
	}
	w.start(services...)
	for _, service := range services {
		connected(service)
	}
	printed := w.headscaleMap("relay")
	// Each tells of itself in a comment.
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
	w.saw("one node killed: traffic again after %.1f s", end.TCPSilence)

	// The key is changed as the README says, and the nodes forward at each step.
	for _, step := range []struct{ service, keys string }{
		{"relay", newKey + "," + oldKey},
		{"relay-two", newKey + "," + oldKey},
		{"relay", newKey},
		{"relay-two", newKey},
	} {
		describe(step.service, step.keys)
		w.start(step.service)
		for _, service := range services {
			connected(service)
		}
		w.pings("a", "b", "derpd")
	}
	w.saw("forwards at each of 4 steps of a new key")

	// One that has another key is told so, and is not let in.
	describe("relay-two", oldKey)
	w.start("relay-two")
	w.eventually("the nodes to part", func() error {
		if out, _ := w.tryExec("relay", "/derpd", "healthcheck"); !strings.Contains(out, "0 of 1 nodes connected") {
			return fmt.Errorf("health: %s", out)
		}
		return nil
	})
	w.unreachable("a", "b")
}
