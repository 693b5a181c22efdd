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

	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// startWithFiles starts derpd with a limit of open files, and waits until it is ready.
func startWithFiles(ctx context.Context, t *testing.T, limit int, env ...string) *running {
	t.Helper()
	p := &running{admin: testkit.FreeAddr(t)}
	cmd := exec.CommandContext(ctx, "sh", "-c", fmt.Sprintf(`ulimit -n %d; exec "$0"`, limit), testkit.LinkAsDerpd(t))
	cmd.Env = testkit.LastOfEach(testkit.Environ(t, append(env, "DERP_ADMIN_ADDR="+p.admin)...))
	cmd.Stderr = &p.stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() })
	testkit.Until(t, "derpd is ready", func() bool { return strings.Contains(p.stderr.String(), `"message":"ready"`) })
	return p
}

// strangersOf returns a function that connects to addr as often as it can. Connections
// that were closed are replaced at each call.
func strangersOf(ctx context.Context, t *testing.T, addr string, from ...string) (connect func()) {
	t.Helper()
	strangers := make([]net.Conn, 100*len(from))
	t.Cleanup(func() {
		for _, conn := range strangers {
			if conn != nil {
				_ = conn.Close()
			}
		}
	})
	return func() {
		for i := range strangers {
			if strangers[i] != nil {
				_ = strangers[i].SetReadDeadline(time.Now().Add(time.Millisecond))
				if _, err := strangers[i].Read(make([]byte, 1)); isTimeout(err) {
					continue // still connected
				}
				_ = strangers[i].Close()
			}
			d := net.Dialer{Timeout: time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from[i%len(from)])}}
			strangers[i], _ = d.DialContext(ctx, "tcp", addr)
		}
	}
}

// TestStrangersAtTheLimits asserts that strangers who take every connection that they can
// get keep no new client out, with few open files.
func TestStrangersAtTheLimits(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	public := testkit.FreeAddr(t)
	p := startWithFiles(ctx, t, 128, "DERP_ADDR="+public, "DERP_CERT_MODE=off", "DERP_HTTP_PORT=-1")
	connect := strangersOf(ctx, t, public, "127.0.0.1", "127.0.0.2", "127.0.0.3")
	for range 2 {
		connect()
		if status, _, err := p.ask(ctx, "/livez"); err != nil || status != http.StatusOK {
			t.Fatalf("/livez: %d, %v", status, err)
		}
		if status, body, err := p.ask(ctx, "/readyz"); err != nil || status != http.StatusOK {
			t.Fatalf("/readyz: %d, %v\n%s", status, err, body)
		}
		for _, from := range []string{"127.0.0.9", "127.0.0.1"} { // an own address, and one of the strangers
			c := testkit.URLClient(t, "http://"+public+"/derp", key.NewNode())
			c.SetURLDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
				d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
				return d.DialContext(ctx, network, addr)
			})
			testkit.Within(t, 10*time.Second, "a client from "+from, func(context.Context) error { return testkit.Admitted(t, c) })
			_ = c.Close()
		}
	}
	if text := p.page(t, "/metrics"); !strings.Contains(text, `derpd_accept_refused_total{listener="https"} 0`) {
		t.Errorf("connections took descriptors of the reserve:\n%s", text)
	}
	testkit.Until(t, "a warning about a limit", func() bool { return strings.Contains(p.stderr.String(), "a limit closes connections") })
}

// TestDescriptorsGone asserts that strangers who take every connection they can get
// leave the descriptors that /livez, the self-check, the health report and metrics
// need. The relay stays ready, and STUN open.
func TestDescriptorsGone(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	public := testkit.FreeAddr(t)
	health := testkit.FreeAddr(t)
	p := startWithFiles(ctx, t, 64, "DERP_ADDR="+public, "DERP_HEALTH_ADDR="+health,
		"DERP_MAX_CONNECTIONS=off", "DERP_MAX_STRANGERS=off", "DERP_MAX_PER_ADDRESS=off", "DERP_ACCEPT_RATE=off")
	connect := strangersOf(ctx, t, public, "127.0.0.1")
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
			if took := time.Since(begin); err != nil || took > limit || status != http.StatusOK {
				t.Fatalf("%s: %d, %v after %s\n%s", path, status, err, took, body)
			}
		}
		if _, _, err := (&running{admin: health}).ask(ctx, "/readyz"); err != nil {
			t.Fatalf("the health listener: %v", err)
		}
	}
	if lines := p.logged(t, "the relay cannot serve clients"); len(lines) > 0 {
		t.Errorf("STUN was closed: %v", lines)
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
