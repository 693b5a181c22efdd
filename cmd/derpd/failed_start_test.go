package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"derpd/internal/testkit"
)

// TestFailedStartFreesItsPorts asserts that a start which fails after it has
// bound sockets closes all of them, so that the next start can bind them.
func TestFailedStartFreesItsPorts(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(t *testing.T, dir string, stun net.Addr)
		want  string
	}{
		"a port is taken": {func(t *testing.T, _ string, stun net.Addr) {
			t.Helper()
			conn, err := new(net.ListenConfig).ListenPacket(t.Context(), "udp", stun.String())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = conn.Close() })
		}, "DERP_STUN_PORT: listening on "},
		"the certificate cannot be stored": {func(t *testing.T, dir string, _ net.Addr) {
			t.Helper()
			if err := os.MkdirAll(filepath.Join(dir, "certs", "pinned.pem.pin", "in-the-way"), 0o700); err != nil {
				t.Fatal(err)
			}
		}, "DERP_CERT_DIR: "},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			https, plain, admin, health, stun := testkit.FreePort(t), testkit.FreePort(t), testkit.FreePort(t), testkit.FreePort(t), testkit.FreePort(t)
			tt.spoil(t, dir, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: stun})
			ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
			defer cancel()
			err := run(ctx, time.Now(), nil, testkit.LastOfEach(testkit.Environ(t, "DERP_DATA_DIR="+dir,
				fmt.Sprintf("DERP_ADDR=127.0.0.1:%d", https), fmt.Sprintf("DERP_HTTP_PORT=%d", plain), fmt.Sprintf("DERP_STUN_PORT=%d", stun),
				fmt.Sprintf("DERP_ADMIN_ADDR=127.0.0.1:%d", admin), fmt.Sprintf("DERP_HEALTH_ADDR=127.0.0.1:%d", health))), io.Discard, io.Discard)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("the start ends with %v, want %q", err, tt.want)
			}
			for _, port := range []int{https, plain, admin, health} {
				ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", fmt.Sprintf("127.0.0.1:%d", port))
				if err != nil {
					t.Error(err)
					continue
				}
				_ = ln.Close()
			}
			conn, err := new(net.ListenConfig).ListenPacket(t.Context(), "udp", fmt.Sprintf("127.0.0.1:%d", stun))
			if taken := name == "a port is taken"; (err != nil) != taken {
				t.Error(errors.Join(errors.New("the STUN port"), err))
			}
			if err == nil {
				_ = conn.Close()
			}
		})
	}
}
