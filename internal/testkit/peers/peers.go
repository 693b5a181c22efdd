// Package peers runs real tailscaled and headscale for tests: on loopback,
// without root and without any request to the internet. `make peers` builds the
// programs.
package peers

import (
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"derpd/internal/testkit"
)

// variable is the environment variable with the directory of the programs.
const variable = "DERPD_PEERS"

const (
	stopWithin = 10 * time.Second // from SIGTERM to SIGKILL
	logTail    = 16 << 10         // bytes of a program's log that a failed test shows
)

// Program returns the path of one of the programs. The test is skipped when
// DERPD_PEERS is not set. The test fails when the directory lacks the program.
func Program(t testing.TB, name string) string {
	t.Helper()
	directory := os.Getenv(variable)
	if directory == "" {
		t.Skip("real tailscaled and headscale are needed: run make test")
	}
	path, err := exec.LookPath(filepath.Join(directory, name))
	if err != nil {
		t.Fatalf("%s: %v; run make peers", variable, err)
	}
	return path
}

// shortDir creates a directory with a short path, because the kernel allows 107 bytes
// for the path of a socket. The path of t.TempDir contains the name of the test.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "peer")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// environ is the environment of the programs, without any variable of this
// machine but PATH.
func environ(dir string, pairs ...string) []string {
	return append([]string{"HOME=" + dir, "PATH=" + os.Getenv("PATH")}, pairs...)
}

// run runs a program to its end and returns its output.
func run(t testing.TB, env []string, program string, args ...string) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	command := exec.CommandContext(ctx, program, args...)
	command.Env = env
	out, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", filepath.Base(program), args, err, out)
	}
	return out
}

// daemon is a program that runs beside the test, and can be stopped and started
// again.
type daemon struct {
	program string
	args    []string
	env     []string
	log     string // file that every run of the program appends to

	stop func() // ends the current run; nil before the first one
}

// newDaemon describes a program that ends with the test. A failed test shows
// the end of the program's log.
func newDaemon(t testing.TB, env []string, log, program string, args ...string) *daemon {
	d := &daemon{program: program, args: args, env: env, log: log}
	t.Cleanup(func() {
		d.Stop()
		if t.Failed() {
			t.Logf("the end of the log of %s %v:\n%s", filepath.Base(program), args, d.tail())
		}
	})
	return d
}

// start starts the program and waits until ready returns nil.
func (d *daemon) start(t testing.TB, ready func(context.Context) error) {
	t.Helper()
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	ctx, cancel := context.WithCancel(context.Background())
	command := exec.CommandContext(ctx, d.program, d.args...)
	command.Env, command.Stdout, command.Stderr = d.env, log, log
	command.Cancel = func() error { return command.Process.Signal(syscall.SIGTERM) }
	command.WaitDelay = stopWithin
	if err := command.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = command.Wait()
		close(ended)
	}()
	d.stop = sync.OnceFunc(func() {
		cancel()
		<-ended
	})
	name := filepath.Base(d.program)
	testkit.Wait(t, name+" to answer", func(ctx context.Context) error {
		select {
		case <-ended:
			t.Fatalf("%s has ended; its log follows", name)
		default:
		}
		return ready(ctx)
	})
}

// Stop ends the program. Stop of a program that does not run does nothing.
func (d *daemon) Stop() {
	if d.stop != nil {
		d.stop()
	}
}

// tail returns the end of the log.
func (d *daemon) tail() []byte {
	file, err := os.Open(d.log)
	if err != nil {
		return nil
	}
	defer func() { _ = file.Close() }()
	if _, err := file.Seek(-logTail, io.SeekEnd); err != nil {
		_, _ = file.Seek(0, io.SeekStart) // the log is shorter
	}
	text, _ := io.ReadAll(file)
	return text
}
