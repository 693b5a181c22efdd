package main

import (
	"strings"
	"testing"

	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// TestStartLog asserts what an operator reads in the log of a start and a stop.
func TestStartLog(t *testing.T) {
	closed := "DERP_ALLOW_KEYS=" + key.NewNode().Public().String()
	for name, tt := range map[string]struct {
		env  []string
		want map[string]string // level by the begin of the message; empty for a message that must not be there
	}{
		"open": {nil, map[string]string{
			"this relay is open: ": "warn", "this relay is open, because": "", "only admitted nodes": "", "configuration": "",
			"listening": "info", "ready": "info", "stopping": "info", "stopped": "info",
		}},
		"open on order": {[]string{"DERP_VERIFY_CLIENTS=false"}, map[string]string{
			"this relay is open: ": "", "this relay is open, because": "warn", "only admitted nodes": "",
		}},
		"closed": {[]string{closed}, map[string]string{
			"this relay is open": "", "only admitted nodes": "info",
		}},
		"a warning": {[]string{closed, "DERP_VERIFY_CLIENT_URL=http://127.0.0.1:1/verify", "DERP_VERIFY_CLIENT_URL_FAIL_OPEN=true"}, map[string]string{
			"configuration": "warn",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			p := startProgram(t, testkit.Environ(t, tt.env...))
			if err := p.stop(); err != nil {
				t.Fatal(err)
			}
			for message, level := range tt.want {
				lines := p.logged(t, message)
				switch {
				case level == "" && len(lines) > 0:
					t.Errorf("%q is logged: %v", message, lines)
				case level != "" && (len(lines) != 1 || lines[0]["level"] != level):
					t.Errorf("%q is logged as %v, want once at level %s", message, lines, level)
				}
			}
			if lines := p.logged(t, "listening"); len(lines) == 1 {
				for _, field := range []string{"version", "upstream", "https", "http", "stun", "admin", "certificates", "node_key"} {
					if lines[0][field] == nil || lines[0][field] == "" {
						t.Errorf("the line about the listeners lacks %s: %v", field, lines[0])
					}
				}
				if upstream, _ := lines[0]["upstream"].(string); lines[0]["version"] != version || !strings.HasPrefix(upstream, "v1.") {
					t.Errorf("version %v, upstream %v", lines[0]["version"], lines[0]["upstream"])
				}
			}
		})
	}
}
