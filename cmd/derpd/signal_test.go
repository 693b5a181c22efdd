package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"derpd/internal/testkit"
)

// TestSignals asserts that the signal of a container manager and the one of a
// terminal stop the program with exit code 0.
func TestSignals(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// Under the name derpd the test binary runs the program.
	path := filepath.Join(t.TempDir(), "derpd")
	if err := os.Symlink(self, path); err != nil {
		t.Fatal(err)
	}
	for _, signal := range []os.Signal{syscall.SIGTERM, syscall.SIGINT} {
		ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
		defer cancel()
		var log lockedBuffer
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
