//go:build linux

package main

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// The long path delivers everything, in order, and with its delay. The test runs in
// a process and a network namespace of its own.
func TestLongPath(t *testing.T) {
	const inside = "DERPD_TEST_OWN_NETWORK"
	if os.Getenv(inside) == "" {
		if _, err := os.Stat("/dev/net/tun"); err != nil || os.Getuid() != 0 {
			t.Skip("needs root and /dev/net/tun")
		}
		command := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestLongPath$")
		command.Env = append(os.Environ(), inside+"=1")
		command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		if out, err := command.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	ctx := t.Context()
	slow := link{delay: 50 * time.Millisecond, rate: 50e6 / 8, queue: 100 * time.Millisecond}
	lossy := slow
	lossy.loss = 0.01
	if err := ownNetwork(ctx); err != nil {
		t.Fatal(err)
	}
	path, err := newPath(ctx, lossy, slow)
	if err != nil {
		t.Fatal(err)
	}
	carried := make(chan error, 1)
	go func() { carried <- path.carry() }()
	if ownNetwork(ctx) == nil {
		t.Error("ownNetwork accepts a network namespace with a device")
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", netip.AddrPortFrom(pathNear, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	sent := bytes.Repeat([]byte("derpd\n"), 40000) // some hundred packets, of which a few are lost
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = conn.Write(sent)
		_ = conn.Close()
	}()
	var conn net.Conn
	began := time.Now()
	if err := path.inFar(func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < 2*slow.delay {
		t.Errorf("connected after %v, want %v or more", took, 2*slow.delay)
	}
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d of %d bytes arrived, equal %v, %v", len(got), len(sent), bytes.Equal(got, sent), err)
	}
	path.close()
	if err := <-carried; err == nil {
		t.Error("carry returned nil after its devices were closed")
	}
}
