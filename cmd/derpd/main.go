// Command derpd is a self-hosted relay for Tailscale and Headscale networks:
// a DERP relay, a STUN server and automatic TLS, configured by environment
// variables alone.
//
// This package is the command line. verbs.go is the table of commands; each
// command is one file. internal/config turns the environment into a typed
// configuration, internal/node puts a relay together from it and runs it,
// internal/admin is the listener for the operator, and internal/host describes
// the machine.
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
)

// Exit codes. A supervisor can tell a configuration that will never work
// (exitUsage) from a relay that failed.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
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

// configError counts the problems of a configuration, and prints each on a line
// of its own.
func configError(err error) error {
	lines := strings.Split(err.Error(), "\n")
	if len(lines) == 1 {
		return usageError{fmt.Errorf("not started, nothing was changed: %w", err)}
	}
	return usageError{fmt.Errorf("not started, nothing was changed; %d problems:\n  %s", len(lines), strings.Join(lines, "\n  "))}
}

// exitCode prints err and returns the exit code for it.
func exitCode(err error, stderr io.Writer) int {
	if err == nil {
		return exitOK
	}
	if !errors.Is(err, errPrinted) {
		_, _ = fmt.Fprintf(stderr, "derpd: %s\n", strings.TrimRight(err.Error(), "\n"))
	}
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	return exitFailed
}
