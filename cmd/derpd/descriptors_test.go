package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"derpd/internal/testkit"
)

// TestDescriptorsGone asserts that strangers who take every connection they can get
// leave the descriptors that /livez, the health report and metrics need.
func TestDescriptorsGone(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	p := &running{admin: testkit.FreeAddr(t)}
	public := testkit.FreeAddr(t)
	health := testkit.FreeAddr(t)
	cmd := exec.CommandContext(ctx, "sh", "-c", `ulimit -n 64; exec "$0"`, testkit.LinkAsDerpd(t))
	cmd.Env = testkit.LastOfEach(testkit.Environ(t, "DERP_ADDR="+public, "DERP_ADMIN_ADDR="+p.admin, "DERP_HEALTH_ADDR="+health))
	cmd.Stderr = &p.stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }()
	testkit.Until(t, "derpd is ready", func() bool { return strings.Contains(p.stderr.String(), `"message":"ready"`) })

	strangers := make([]net.Conn, 100)
	defer func() {
		for _, conn := range strangers {
			if conn != nil {
				_ = conn.Close()
			}
		}
	}()
	connect := func() {
		for i := range strangers {
			if strangers[i] != nil {
				_ = strangers[i].SetReadDeadline(time.Now().Add(time.Millisecond))
				if _, err := strangers[i].Read(make([]byte, 1)); isTimeout(err) {
					continue // still connected
				}
				_ = strangers[i].Close()
			}
			strangers[i], _ = (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", public)
		}
	}
	connect()
	testkit.Until(t, "connections are refused", func() bool {
		connect()
		return strings.Contains(p.stderr.String(), "too many open files")
	})
	for range 10 {
		connect()
		for _, path := range []string{"/livez", "/readyz", "/metrics"} {
			begin := time.Now()
			status, body, err := p.ask(ctx, path)
			limit := time.Second
			if path == "/readyz" {
				limit = 4 * time.Second // it waits for its slowest check
			}
			if took := time.Since(begin); err != nil || took > limit || path != "/readyz" && status != http.StatusOK {
				t.Fatalf("%s: %d, %v after %s\n%s", path, status, err, took, body)
			}
		}
		if _, _, err := (&running{admin: health}).ask(ctx, "/readyz"); err != nil {
			t.Fatalf("the health listener: %v", err)
		}
	}
	if text := p.page(t, "/metrics"); !strings.Contains(text, `derpd_accept_refused_total{listener="https"} `) || strings.Contains(text, `derpd_accept_refused_total{listener="https"} 0`) {
		t.Errorf("the metrics count no refused connection:\n%s", text)
	}
	// A state of failure ends after ten seconds without an error, which a slow machine
	// may have between two waves. No socket has a second warning before that.
	begin := make(map[any]time.Time) // of the state of each socket
	for _, line := range p.logged(t, "socket fails") {
		at, err := time.Parse(time.RFC3339, fmt.Sprint(line["time"]))
		if err != nil {
			t.Fatal(err)
		}
		if before, ok := begin[line["socket"]]; ok && at.Sub(before) < 9*time.Second {
			t.Errorf("%v warns again after %s:\n%s", line["socket"], at.Sub(before), p.stderr.String())
		}
		begin[line["socket"]] = at
	}
	if _, ok := begin["https"]; !ok {
		t.Errorf("no warning about the listener:\n%s", p.stderr.String())
	}
}

func isTimeout(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded)
}
