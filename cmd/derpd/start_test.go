package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"derpd/internal/testkit"
)

// A bad configuration ends the start with exit code 2 and all its problems, before
// anything listens or is written.
func TestBadConfigurations(t *testing.T) {
	for _, tt := range []struct {
		env  []string
		want string
	}{
		{[]string{"DERP_DOMIAN=x"}, "derpd: not started, nothing was changed: DERP_DOMIAN: unknown variable; did you mean DERP_DOMAIN?"},
		{[]string{"DERP_ADDR=443", "DERP_REGION_ID=0", "DERP_LOG_LEVEL=loud", "DERP_DOMIAN=x"}, `derpd: not started, nothing was changed; 4 problems:
  DERP_DOMIAN: unknown variable; did you mean DERP_DOMAIN?
  DERP_ADDR: want host:port or :port, got "443"
  DERP_REGION_ID: want a number from 900 to 999 (the others are Tailscale's), got "0"
  DERP_LOG_LEVEL: want debug, info, warn or error, got "loud"`},
	} {
		dir := filepath.Join(t.TempDir(), "data")
		env := append(testkit.Environ(t, tt.env...), "DERP_DATA_DIR="+dir)
		var stdout, stderr bytes.Buffer
		ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
		defer cancel()
		code := exitCode(run(ctx, time.Now(), nil, testkit.LastOfEach(env), &stdout, &stderr), &stderr)
		if got := strings.TrimSpace(stderr.String()); got != tt.want || code != exitUsage || stdout.Len() > 0 {
			t.Errorf("exit code %d, stdout %q, stderr\n%s\nwant\n%s", code, &stdout, got, tt.want)
		}
		if _, err := os.Stat(dir); err == nil {
			t.Error("the start made the data directory")
		}
	}
}

// A socket that is taken stops the start, and takes nothing else.
func TestTakenPorts(t *testing.T) {
	tcp, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tcp.Close() }()
	udp, err := new(net.ListenConfig).ListenPacket(t.Context(), "udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = udp.Close() }()
	_, tcpPort, _ := net.SplitHostPort(tcp.Addr().String())
	_, udpPort, _ := net.SplitHostPort(udp.LocalAddr().String())
	const fix = "bind: address already in use; another program listens there: stop it, or choose another port"

	for _, tt := range []struct {
		env  []string
		want string
	}{
		{[]string{"DERP_ADDR=127.0.0.1:" + tcpPort}, "DERP_ADDR: listening on 127.0.0.1:" + tcpPort + ": " + fix},
		{[]string{"DERP_HTTP_PORT=" + tcpPort}, "DERP_HTTP_PORT: listening on 127.0.0.1:" + tcpPort + ": " + fix},
		{[]string{"DERP_ADMIN_ADDR=127.0.0.1:" + tcpPort}, "DERP_ADMIN_ADDR: listening on 127.0.0.1:" + tcpPort + ": " + fix},
		{[]string{"DERP_HEALTH_ADDR=127.0.0.1:" + tcpPort}, "DERP_HEALTH_ADDR: listening on 127.0.0.1:" + tcpPort + ": " + fix},
		{[]string{"DERP_STUN_PORT=" + udpPort}, "DERP_STUN_PORT: listening on 127.0.0.1:" + udpPort + ": " + fix},
		{[]string{"DERP_ADDR=203.0.113.7:0", "DERP_STUN_ADDR=127.0.0.1", "DERP_HTTP_PORT=-1"}, "DERP_ADDR: listening on 203.0.113.7:0: bind: cannot assign requested address; no interface has this address: leave the host empty to listen on all"},
		{[]string{"DERP_ADDR=127.0.0.1:" + tcpPort, "DERP_STUN_PORT=" + udpPort}, "2 problems:\n  DERP_ADDR: listening on 127.0.0.1:" + tcpPort + ": " + fix + "\n  DERP_STUN_PORT: listening on 127.0.0.1:" + udpPort + ": " + fix},
	} {
		dir := filepath.Join(t.TempDir(), "data")
		var stderr bytes.Buffer
		env := append(testkit.Environ(t, tt.env...), "DERP_DATA_DIR="+dir)
		code := exitCode(run(t.Context(), time.Now(), nil, testkit.LastOfEach(env), &stderr, &stderr), &stderr)
		if got := strings.TrimSpace(stderr.String()); !strings.HasSuffix(got, tt.want) || code != exitUsage {
			t.Errorf("%v: exit code %d, %s; want %s", tt.env, code, got, tt.want)
		}
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("%v: the start made the data directory", tt.env)
		}
	}
}
