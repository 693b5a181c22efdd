package config

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tailscale.com/types/key"

	"derpd/internal/testkit"
	"derpd/relay"
)

// Without variables a node has no rate. With a rate its burst is shown by `derpd env`.
func TestNodeLimits(t *testing.T) {
	for env, want := range map[string]relay.NodeLimit{
		"":                        {Connections: 16},
		"DERP_MAX_PER_NODE=0":     {},
		"DERP_CLIENT_RATE=20Mbit": {Rate: 2_500_000, Burst: 625_000, Connections: 16},
		"DERP_CLIENT_RATE=20Mbit DERP_CLIENT_BURST=1MiB DERP_MAX_PER_NODE=4": {Rate: 2_500_000, Burst: 1 << 20, Connections: 4},
	} {
		c, err := Load(testkit.Environ(t, append(strings.Fields(env), "DERP_CERT_MODE=pinned")...))
		if err != nil {
			t.Fatal(err)
		}
		if c.NodeLimits.Defaults != want || c.NodeLimits.May() != (want.Rate > 0) {
			t.Errorf("%s: %+v, want %+v", env, c.NodeLimits, want)
		}
		var shown bytes.Buffer
		if err := c.WriteEffective(&shown); err != nil {
			t.Fatal(err)
		}
		if line := "DERP_CLIENT_BURST=625000  # default"; strings.Contains(shown.String(), line) != (env == "DERP_CLIENT_RATE=20Mbit") {
			t.Errorf("%s: derpd env prints\n%s", env, shown.String())
		}
	}
}

// A line about something that no source says is a warning at the start. A tailscaled
// socket that may appear later says tags.
func TestUselessLimits(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "limits")
	if err := os.WriteFile(file, []byte("tag:guest rate=2Mbit\ntag:slow rate=1Mbit\ncomment:nas rate=3Mbit\ntailnet:ours.ts.net rate=4Mbit\n* rate=5Mbit\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	const (
		comment = `DERP_LIMITS_FILE: line 3 fits no node, because comments come from DERP_ALLOW_KEYS, and the relay does not use it; write nodekey:… in place of "comment:nas"`
		tag     = `DERP_LIMITS_FILE: line 1 fits no node, because tags and tailnets come from Tailscale's API or a tailscaled socket, and the relay does not use it; write nodekey:… in place of "tag:gues…"`
		tailnet = `DERP_LIMITS_FILE: line 4 fits no node, because tags and tailnets come from Tailscale's API or a tailscaled socket, and the relay does not use it; write nodekey:… in place of "tailnet:ours…"`
	)
	keys := "DERP_ALLOW_KEYS=" + key.NewNode().Public().String()
	for env, want := range map[string][]string{
		"":                                 {comment},
		keys:                               {tag, tailnet},
		"DERP_TAILNET_API_KEY=tskey-api-x": {comment},
		"DERP_VERIFY_CLIENT_URL=https://headscale.example.com/verify":                {tag, comment, tailnet},
		keys + " DERP_VERIFY_CLIENTS=true DERP_TAILSCALED_SOCKET=" + dir + "/socket": nil,
	} {
		c, err := Load(testkit.Environ(t, append(strings.Fields(env), "DERP_CERT_MODE=pinned", "DERP_LIMITS_FILE="+file)...))
		if err != nil {
			t.Fatal(err)
		}
		got := slices.DeleteFunc(c.Warnings, func(w string) bool { return !strings.HasPrefix(w, "DERP_LIMITS_FILE") })
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", env, got, want)
		}
	}
}
