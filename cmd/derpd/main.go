// Command derpd is a self-hosted relay for Tailscale and Headscale networks:
// a DERP relay, a STUN server and automatic TLS, configured by environment
// variables alone.
//
// This package is the command line. verbs.go is the table of commands; each
// command is one file. A new command is one line in the table and one file.
//
// The rest is in the packages below:
//
//   - internal/config turns the environment into a typed configuration
//   - internal/node puts a relay together from the configuration, and runs it
//   - internal/admin is the listener for the operator
//   - internal/host describes the machine
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"derpd/internal/redact"
)

// Exit codes. A supervisor can distinguish a configuration that will never work
// (exitUsage) from a relay that failed.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
	exitNewer  = 3 // of `derpd version --check`
)

func main() {
	start := time.Now()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	// After the first signal the default is back: the second one kills.
	context.AfterFunc(ctx, stop)
	os.Exit(exitCode(run(ctx, start, os.Args[1:], os.Environ(), os.Stdout, os.Stderr), os.Stderr))
}

// usageError is an error in the command line or the environment. The next start
// would fail in the same way. Nothing on disk was changed.
type usageError struct{ error }

// Unwrap returns the cause.
func (e usageError) Unwrap() error { return e.error }

// errPrinted is a failure whose text was already printed.
var errPrinted = errors.New("already printed")

// errNewer reports that a newer release is out, which was already printed.
var errNewer = fmt.Errorf("a newer release is out: %w", errPrinted)

// configError is the error of a command whose configuration is refused. It
// counts the problems, and has each on a line of its own.
func (c *call) configError(err error) error {
	effect := "not started, nothing was changed"
	if c.verb.name != "serve" {
		effect = "configuration refused, nothing was changed"
	}
	lines := strings.Split(err.Error(), "\n")
	if len(lines) == 1 {
		return usageError{fmt.Errorf("%s: %w", effect, err)}
	}
	return usageError{fmt.Errorf("%s; %d problems:\n  %s", effect, len(lines), strings.Join(lines, "\n  "))}
}

// exitCode prints err and returns the exit code for it.
func exitCode(err error, stderr io.Writer) int {
	if err == nil {
		return exitOK
	}
	if !errors.Is(err, errPrinted) {
		_, _ = fmt.Fprintf(stderr, "derpd: %s\n", strings.TrimRight(redact.Secrets(err.Error()), "\n"))
	}
	if errors.Is(err, errNewer) {
		return exitNewer
	}
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	return exitFailed
}
