package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

const (
	// fetchTimeout limits each command that asks the module proxy.
	fetchTimeout = 5 * time.Minute
	// compileTimeout limits the build, and the tests. Neither needs the network.
	compileTimeout = 30 * time.Minute
	// pipeTimeout limits the wait for the output of a command that has ended.
	pipeTimeout = 5 * time.Second
)

// goTool is the go command, which handles GOPROXY, failing proxies, retractions
// and checksums.
type goTool struct {
	env     []string
	timeout time.Duration // limit of a command that asks the module proxy
}

// environ is the environment of every command. The caller's may pin the old
// toolchain, but a new release may need a newer one. derpd is built without cgo.
func (g goTool) environ() []string {
	return append(g.env[:len(g.env):len(g.env)], "GOTOOLCHAIN=auto", "GOWORK=off", "CGO_ENABLED=0")
}

// errTimeout means that a command did not end within its limit.
var errTimeout = errors.New("timeout")

// fetch runs a go command that asks the module proxy, and returns its output.
func (g goTool) fetch(ctx context.Context, dir string, args ...string) ([]byte, error) {
	out, stderr, err := g.run(ctx, g.timeout, dir, args...)
	if errors.Is(err, errTimeout) {
		return nil, fmt.Errorf("%s: no answer from the module proxy within %v; try again later, or set GOPROXY to another proxy (%w)", commandLine(args), g.timeout, errTimeout)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", commandLine(args), err, stderr)
	}
	return out, nil
}

// compile runs a go command that compiles what has been fetched. Failing tests
// print to the standard output, so the error has both outputs.
func (g goTool) compile(ctx context.Context, args ...string) error {
	out, stderr, err := g.run(ctx, compileTimeout, "", args...)
	if err != nil {
		return fmt.Errorf("%s: %w\n%s%s", commandLine(args), err, out, stderr)
	}
	return nil
}

func (g goTool) run(ctx context.Context, limit time.Duration, dir string, args ...string) (out, stderr []byte, err error) {
	return execute(ctx, limit, dir, g.environ(), "go", args...)
}

// execute runs a program until it ends, the limit passes, or ctx is done. Then its
// children end as well: compilers, tests and git, which outlive a killed parent.
func execute(ctx context.Context, limit time.Duration, dir string, env []string, program string, args ...string) (out, stderr []byte, err error) {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(limited, program, args...)
	cmd.Dir, cmd.Env = dir, env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = pipeTimeout
	var outBuffer, errBuffer bytes.Buffer
	cmd.Stdout, cmd.Stderr = &outBuffer, &errBuffer
	err = cmd.Run()
	switch {
	case ctx.Err() != nil:
		err = ctx.Err()
	case err != nil && limited.Err() != nil:
		err = fmt.Errorf("not finished after %v (%w)", limit, errTimeout)
	}
	return outBuffer.Bytes(), errBuffer.Bytes(), err
}

func commandLine(args []string) string { return "go " + strings.Join(args, " ") }
