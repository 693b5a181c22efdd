package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"derpd/cmd/derpd/internal/admin"
	"derpd/internal/testkit"
)

// TestSignals asserts that the signal of a container manager and the one of a
// terminal stop the program with exit code 0.
func TestSignals(t *testing.T) {
	path := testkit.LinkAsDerpd(t)
	for _, signal := range []os.Signal{syscall.SIGTERM, syscall.SIGINT} {
		ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
		defer cancel()
		var log testkit.Buffer
		cmd := exec.CommandContext(ctx, path)
		cmd.Env, cmd.Stderr = testkit.LastOfEach(testkit.Environ(t)), &log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		testkit.Until(t, "derpd is ready", func() bool { return strings.Contains(log.String(), `"message":"ready"`) })
		if err := cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil || !strings.Contains(log.String(), `"message":"stopped"`) {
			t.Errorf("%s: %v\n%s", signal, err, log.String())
		}
	}
}

// TestSecondSignal asserts that a second signal ends a program that the first one
// could not stop. Here nobody reads the map from its stdout.
func TestSecondSignal(t *testing.T) {
	read, full, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = read.Close(), full.Close() }()
	if err := full.SetWriteDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	// Until the pipe is full.
	if _, err := full.Write(make([]byte, 1<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("filling the pipe: %v", err)
	}
	// The first signal may come before the program writes the map. The
	// program then ends by itself.
	for range 10 {
		state := signalTwice(t, full)
		if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() && status.Signal() == syscall.SIGTERM {
			return
		}
		t.Logf("derpd ended with %s", state)
	}
	t.Error("no second signal ended derpd")
}

// signalTwice starts derpd, and sends signals after the first until it has ended.
func signalTwice(t *testing.T, stdout *os.File) *os.ProcessState {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	addr := testkit.FreeAddr(t)
	var log testkit.Buffer
	cmd := exec.CommandContext(ctx, testkit.LinkAsDerpd(t))
	cmd.Env, cmd.Stdout, cmd.Stderr = testkit.LastOfEach(testkit.Environ(t, "DERP_ADMIN_ADDR="+addr)), stdout, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	testkit.Until(t, "derpd is ready", func() bool { return strings.Contains(log.String(), `"message":"ready"`) })
	if _, err := (admin.Client{Addr: addr}).Map(ctx, "json"); err != nil {
		t.Error(err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	testkit.Until(t, "derpd is stopping", func() bool { return strings.Contains(log.String(), `"message":"stopping"`) })
	testkit.Until(t, "derpd ends", func() bool {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
			return true
		default:
			return false
		}
	})
	return cmd.ProcessState
}
