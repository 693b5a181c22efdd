package config

import (
	"strings"
	"testing"

	"derpd/relay"
)

// The defaults depend on the memory and on the open files.
func TestLimits(t *testing.T) {
	const mib = 1 << 20
	for _, tt := range []struct {
		env     LimitsEnv
		machine machine
		want    relay.Limits
	}{
		{LimitsEnv{}, machine{64 * mib, 65408}, relay.Limits{Connections: 512, Strangers: 170, PerAddress: 64}},
		{LimitsEnv{}, machine{128 * mib, 65408}, relay.Limits{Connections: 1536, Strangers: 512, PerAddress: 192}},
		{LimitsEnv{}, machine{256 * mib, 65408}, relay.Limits{Connections: 3584, Strangers: 1194, PerAddress: 448}},
		{LimitsEnv{}, machine{64 << 30, 65408}, relay.Limits{Connections: 65408, Strangers: 21802, PerAddress: 8176}},
		{LimitsEnv{}, machine{128 * mib, 128}, relay.Limits{Connections: 128, Strangers: 42, PerAddress: 64}},
		{LimitsEnv{}, machine{128 * mib, 32}, relay.Limits{Connections: 32, Strangers: 10, PerAddress: 32}},
		{LimitsEnv{}, machine{8 * mib, 65408}, relay.Limits{Connections: 64, Strangers: 21, PerAddress: 64}},
		{LimitsEnv{MaxConnections: "off"}, machine{128 * mib, 65408}, relay.Limits{Strangers: 512, PerAddress: 192}},
		{LimitsEnv{MaxConnections: "300"}, machine{128 * mib, 65408}, relay.Limits{Connections: 300, Strangers: 100, PerAddress: 64}},
		{LimitsEnv{MaxStrangers: "off", MaxPerAddress: "off"}, machine{128 * mib, 65408}, relay.Limits{Connections: 1536}},
		{LimitsEnv{MaxConnections: "off", MaxStrangers: "9999", MaxPerAddress: "4", AcceptRate: "7"}, machine{128 * mib, 65408}, relay.Limits{Strangers: 9999, PerAddress: 4, AcceptRate: 7, AcceptBurst: 35}},
		{LimitsEnv{MaxConnections: "16", MaxStrangers: "16", MaxPerAddress: "16", AcceptRate: "off"}, machine{128 * mib, 65408}, relay.Limits{Connections: 16, Strangers: 16, PerAddress: 16}},
	} {
		p := new(problems)
		got, warnings := parseLimits(p, tt.env, tt.machine)
		if err := p.err(nil); err != nil || len(warnings) > 0 {
			t.Errorf("%+v: %v, %q", tt.env, err, warnings)
		}
		equal(t, strings.TrimSpace(strings.Join([]string{tt.env.MaxConnections, tt.env.MaxStrangers}, " ")), got, tt.want)
	}
	_, warnings := parseLimits(new(problems), LimitsEnv{MaxConnections: "5000"}, machine{128 * mib, 896})
	equal(t, "warnings", warnings, []string{"DERP_MAX_CONNECTIONS is 5000, but the limit of open files leaves 896 connections; raise the limit of open files to 5128"})
}

// `derpd env` prints the derived limits, and the relay gets them.
func TestLimitsAreShown(t *testing.T) {
	c := good(t, "DERP_MAX_CONNECTIONS=24", "DERP_MAX_PER_ADDRESS=off")
	equal(t, "limits", c.Limits, relay.Limits{Connections: 24, Strangers: 8, AcceptRate: 50, AcceptBurst: 250})
	text := shown(t, c)
	for _, want := range []string{
		"DERP_MAX_CONNECTIONS=24  # set\n",
		"DERP_MAX_STRANGERS=8  # default: a third of DERP_MAX_CONNECTIONS\n",
		"DERP_MAX_PER_ADDRESS=off  # set\n",
		"DERP_ACCEPT_RATE=50  # default\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("derpd env lacks %q:\n%s", want, text)
		}
	}
	// The defaults of this machine are valid.
	if l := good(t).Limits; l.Connections < 16 || l.Strangers < 4 || l.Strangers > l.Connections || l.PerAddress > l.Connections {
		t.Errorf("this machine has the limits %+v", l)
	}
}
