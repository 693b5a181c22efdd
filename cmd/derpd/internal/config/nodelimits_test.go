package config

import (
	"bytes"
	"strings"
	"testing"

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
