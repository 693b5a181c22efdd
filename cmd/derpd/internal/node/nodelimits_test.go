package node

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tailscale.com/types/key"

	"derpd/healthz"
	"derpd/internal/testkit"
)

// A line of the file applies to connected nodes, by the comment in the key file, and a
// change of either file moves them to another line. The self-check has no limit, and
// `derpd admit`, health and metrics show the limit.
func TestLimitsOfNodes(t *testing.T) {
	dir := t.TempDir()
	keys, file := filepath.Join(dir, "keys"), filepath.Join(dir, "limits")
	alice, bob := key.NewNode(), key.NewNode()
	put := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put(keys, alice.Public().String()+" # alice\n"+bob.Public().String()+" # bob\n")
	put(file, "comment:alice rate=2Mbit connections=2\n")
	n := begin(t, testkit.Environ(t, "DERP_DOMAIN=derp.example.com", "DERP_CERT_MODE=pinned", "DERP_ALLOW_KEYS="+keys, "DERP_LIMITS_FILE="+file, "DERP_MAX_PER_NODE=5"))
	r := region(t, parsePolicy(t, n.printed))
	a, b := testkit.RegionClient(t, r, alice), testkit.RegionClient(t, r, bob)
	testkit.MustAdmit(t, a, b)
	limit := func(node key.NodePublic) string { return n.admission(t.Context(), node).Limit }
	const others = "no limit on what it sends, 5 connections (DERP_CLIENT_RATE, DERP_MAX_PER_NODE)"
	if got, want := limit(alice.Public()), "sends at most 2 Mbit/s, 64KiB at once, 2 connections (comment:alice, "+file+":1); connections now: 1"; got != want {
		t.Errorf("alice: %q, want %q", got, want)
	}
	if got, want := limit(bob.Public()), others+"; connections now: 1"; got != want {
		t.Errorf("bob: %q, want %q", got, want)
	}
	if got := limit(key.NewNode().Public()); got != "" {
		t.Errorf("a refused node has the limit %q", got)
	}
	if got := n.relay.LimitedNodes().Nodes; got != 1 {
		t.Errorf("%d nodes with a rate, want 1", got)
	}
	if got := n.nodeLimit(n.probe.public[0]); got.Rate != 0 || got.Connections != 0 {
		t.Errorf("the self-check has the limit %+v", got)
	}
	if got := n.checkNodeLimits(context.Background()); got.Level != healthz.OK || !strings.Contains(got.Detail, "lines of "+file+": 1; connected nodes with a rate: 1, slowed down: 0") {
		t.Errorf("%+v", got)
	}

	put(file, "comment:nobody rate=2Mbit\n")
	testkit.Until(t, "no node has a rate", func() bool { return n.relay.LimitedNodes().Nodes == 0 })
	put(file, "comment:bob rate=2Mbit\ncomment:alice\n")
	testkit.Until(t, "a warning", func() bool { return n.checkNodeLimits(context.Background()).Level == healthz.Warn })
	put(file, "comment:bob rate=2Mbit\ncomment:carol rate=4Mbit\n")
	if files := n.Reload(); len(files) < 2 || files[1] != file {
		t.Errorf("files %q are read again", files)
	}
	if got := n.relay.LimitedNodes().Nodes; got != 1 {
		t.Errorf("%d nodes with a rate after a reload, want 1", got)
	}

	put(keys, alice.Public().String()+" # carol\n"+bob.Public().String()+"\n")
	n.Reload()
	n.relay.ApplyNodeLimits() // the relay does so every ten seconds
	if got := limit(alice.Public()); !strings.Contains(got, "sends at most 4 Mbit/s") {
		t.Errorf("alice: %q, want the line of her new comment", got)
	}
	if got := limit(bob.Public()); got != others+"; connections now: 1" {
		t.Errorf("bob: %q, want the defaults", got)
	}
	text := scrape(t, n)
	for _, want := range []string{"derpd_connections_replaced_total 0\n", "derpd_limited_nodes 1\n", "derpd_slowed_nodes 0\n", "derpd_rate_waits_total", "derpd_rate_waited_seconds_total", "derpd_limits_lines 2\n", "derpd_limits_read_errors_total 1\n", `derpd_told_total{reason="slowed"} 0`} {
		if !strings.Contains(text, want) {
			t.Errorf("the metrics have no %q", want)
		}
	}
	testkit.Exchange(t, a, b)
}

// An open relay describes no node.
func TestDescribeWithoutGate(t *testing.T) {
	if got := new(Node).describeNode(key.NewNode().Public()); got.Name != "" || got.Comment != "" || len(got.Tags) != 0 {
		t.Errorf("%+v", got)
	}
}
