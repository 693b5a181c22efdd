package main

import (
	"path/filepath"
	"strings"
	"testing"

	"derpd/internal/testkit"
)

// TestNewCertificateIsServed asserts that a running relay takes a certificate that
// was replaced on disk, says so in the log, and counts it.
func TestNewCertificateIsServed(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "derp.example.com.crt"), filepath.Join(dir, "derp.example.com.key")
	testkit.WritePair(t, cert, key, testkit.SelfSigned(t, "derp.example.com"))
	for name, tt := range map[string]struct {
		env     []string
		replace func(env []string)
	}{
		"pinned": {nil, func(env []string) {
			if _, stderr, code := execute(t, env, "pin", "--rotate"); code != 0 {
				t.Error(stderr)
			}
		}},
		"manual": {[]string{"DERP_CERT_MODE=manual", "DERP_DOMAIN=derp.example.com", "DERP_CERT_DIR=" + dir}, func([]string) {
			testkit.WritePair(t, cert, key, testkit.SelfSigned(t, "derp.example.com"))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			env := testkit.Environ(t, tt.env...)
			p := startProgram(t, env)
			tt.replace(env)
			testkit.Until(t, "the log names the new certificate", func() bool { return len(p.logged(t, "certificate reloaded")) == 1 })
			if line := p.logged(t, "certificate reloaded")[0]; line["level"] != "info" || line["names"] == "" {
				t.Errorf("logged %v", line)
			}
			if text := p.page(t, "/metrics"); !strings.Contains(text, "\nderpd_certificate_reloads_total 1\n") {
				t.Errorf("the metrics do not count the new certificate:\n%s", text)
			}
		})
	}
}
