package testkit

import (
	"slices"
	"strings"
	"testing"
)

// Environ is the environment of a derpd on loopback with free ports, a new data
// directory, and no tailscaled. The pairs, NAME=value, override these variables.
func Environ(t testing.TB, pairs ...string) []string {
	t.Helper()
	return LastOfEach(append([]string{
		"DERP_ADDR=127.0.0.1:0", "DERP_HTTP_PORT=0", "DERP_STUN_PORT=0", "DERP_ADMIN_ADDR=127.0.0.1:0",
		"DERP_DATA_DIR=" + t.TempDir(), "DERP_DISCOVERY=off", "DERP_TAILSCALED_SOCKET=/nonexistent/tailscaled.sock",
		"DERP_PUBLIC_IPV4=127.0.0.1", "DERP_PUBLIC_IPV6=none",
	}, pairs...))
}

// LastOfEach keeps the last value of each variable, as a shell does.
func LastOfEach(environ []string) []string {
	seen := make(map[string]bool)
	var list []string
	for _, pair := range slices.Backward(environ) {
		if name, _, _ := strings.Cut(pair, "="); !seen[name] {
			seen[name] = true
			list = append(list, pair)
		}
	}
	slices.Reverse(list)
	return list
}
