package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"derpd/internal/testkit"
)

// TestNewCertificateIsServed asserts that a running relay takes a certificate that
// was replaced on disk, and refuses one that is damaged. The log and the metrics
// say so.
func TestNewCertificateIsServed(t *testing.T) {
	dir, data := t.TempDir(), t.TempDir()
	cert, key := filepath.Join(dir, "derp.example.com.crt"), filepath.Join(dir, "derp.example.com.key")
	root := testkit.NewAuthority(t)
	issue := func() {
		testkit.WritePair(t, cert, key, testkit.NewCertificate(t, testkit.Certificate{Names: []string{"derp.example.com"}, Issuer: root}), root)
	}
	issue()
	for name, tt := range map[string]struct {
		env     []string
		file    string // of the certificate
		replace func(env []string)
	}{
		"pinned": {[]string{"DERP_DATA_DIR=" + data}, filepath.Join(data, "certs", "pinned.pem"), func(env []string) {
			if _, stderr, code := execute(t, env, "pin", "--rotate"); code != 0 {
				t.Error(stderr)
			}
		}},
		"manual": {[]string{"DERP_CERT_MODE=manual", "DERP_DOMAIN=derp.example.com", "DERP_CERT_DIR=" + dir}, cert, func([]string) { issue() }},
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

			if err := os.WriteFile(tt.file, []byte("nonsense"), 0o600); err != nil {
				t.Fatal(err)
			}
			testkit.Until(t, "the log refuses the damaged file", func() bool { return len(p.logged(t, "certificate files are invalid")) == 1 })
			if line := p.logged(t, "certificate files are invalid")[0]; line["level"] != "error" || line["error"] == "" {
				t.Errorf("logged %v", line)
			}
			if _, stderr, code := execute(t, append(env, "DERP_ADMIN_ADDR="+p.admin), "derpmap"); code != 0 {
				t.Errorf("the running relay gives no map: %s", stderr)
			}
			text := p.page(t, "/metrics")
			for _, want := range []string{"\nderpd_certificate_reloads_total 1\n", "\nderpd_certificate_reload_errors_total 1\n", "\nderpd_certificate_failing 1\n"} {
				if !strings.Contains(text, want) {
					t.Errorf("metrics lack %q:\n%s", want, text)
				}
			}
		})
	}
}
