// Package peers runs the programs that a relay meets in the world, for tests:
// real tailscaled and headscale, on loopback, without root and without asking
// anything of the internet. It is for tests alone; the image is built without it.
package peers

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// variable is what names the folder of the programs, in the environment.
const variable = "DERPD_PEERS"

const (
	patience   = time.Minute            // for what must happen in a test
	pollEvery  = 100 * time.Millisecond // of what is waited for
	stopWithin = 10 * time.Second       // before a program is killed
	logTail    = 16 << 10               // of a program, in bytes, for a test that failed
)

// Wait tries until attempt returns nil, and fails the test with its last error
// when that takes too long.
func Wait(t *testing.T, what string, attempt func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		err := attempt(ctx)
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("waited %v for %s: %v", patience, what, err)
		case <-tick.C:
		}
	}
}

// Program is the path of one of the programs, for tests that start it their own
// way.
func Program(t *testing.T, name string) string {
	t.Helper()
	return find(t, name)
}

// find returns the path of a program. Without a folder the test is skipped;
// with a folder that lacks the program it fails, or nobody would notice.
func find(t *testing.T, name string) string {
	t.Helper()
	folder := os.Getenv(variable)
	if folder == "" {
		t.Skip("real tailscaled and headscale are needed: run make test")
	}
	path, err := exec.LookPath(filepath.Join(folder, name))
	if err != nil {
		t.Fatalf("%s: %v; run make peers", variable, err)
	}
	return path
}

// shortDir is a directory whose path leaves room for a socket's name:
// t.TempDir holds the name of the test, and the kernel takes 107 bytes.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "peer")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// environ is what the programs see: nothing of what this machine has set.
func environ(dir string, pairs ...string) []string {
	return append([]string{"HOME=" + dir, "PATH=" + os.Getenv("PATH")}, pairs...)
}

// freePort finds a port of 127.0.0.1 for a program that binds for itself, and
// again after a stop. It is below those that systems give to whoever asks for
// any port, or somebody would take it in between.
func freePort(t *testing.T) string {
	t.Helper()
	for range 100 {
		port := strconv.Itoa(20000 + rand.IntN(10000))
		ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:"+port)
		if err == nil {
			_ = ln.Close()
			return port
		}
	}
	t.Fatal("no free port")
	return ""
}

// run runs a program to its end and returns what it printed.
func run(t *testing.T, env []string, program string, args ...string) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	command := exec.CommandContext(ctx, program, args...)
	command.Env = env
	out, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", filepath.Base(program), args, err, out)
	}
	return out
}

// daemon is a program that runs beside the test. It can be stopped and started
// again.
type daemon struct {
	program string
	args    []string
	env     []string
	log     string // file; of all its lives

	stop func() // of its present life; nil before the first
}

// newDaemon describes a program, which ends with the test. Its log is shown
// only if the test fails.
func newDaemon(t *testing.T, env []string, log, program string, args ...string) *daemon {
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
func (d *daemon) start(t *testing.T, ready func(context.Context) error) {
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
	Wait(t, name+" to answer", func(ctx context.Context) error {
		select {
		case <-ended:
			t.Fatalf("%s ended: its log follows", name)
		default:
		}
		return ready(ctx)
	})
}

// Stop ends the program; it may be called when it does not run.
func (d *daemon) Stop() {
	if d.stop != nil {
		d.stop()
	}
}

func (d *daemon) tail() []byte {
	file, err := os.Open(d.log)
	if err != nil {
		return nil
	}
	defer func() { _ = file.Close() }()
	if _, err := file.Seek(-logTail, io.SeekEnd); err != nil {
		_, _ = file.Seek(0, io.SeekStart) // it is shorter
	}
	text, _ := io.ReadAll(file)
	return text
}
