package admit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// mountRemedy is the way in which a container gets a socket of tailscaled.
func mountRemedy(socket string) string {
	dir := filepath.Dir(socket)
	return fmt.Sprintf("mount the directory, as compose.yaml does (%s:%s:ro)", dir, dir)
}

// staleRemedy keeps a mounted directory valid. systemd replaces the directory at a
// restart of tailscaled otherwise (tailscale/tailscale#9362).
const staleRemedy = "RuntimeDirectoryPreserve=yes in tailscaled.service keeps that mount valid over restarts"

// isTailscaled is the question about an answer that no tailscaled gives.
const isTailscaled = "is this the socket of tailscaled?"

// CheckSocket returns nil if path leads to a unix socket. The error wraps
// [fs.ErrNotExist] if nothing is there. Any other error means that no socket can
// appear there, and contains the fix. No error contains the path.
func CheckSocket(path string) error {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if link, err := os.Readlink(path); err == nil {
			return fmt.Errorf("the link leads to %s: %w; mount the directory that it leads to, or correct the path", link, syscall.ENOENT)
		}
		return syscall.ENOENT
	case errors.Is(err, syscall.ENOTDIR):
		return fmt.Errorf("a part of the path is a file, not a directory; %s", mountRemedy(path))
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: derpd runs as uid %d, which must be able to enter the directory", syscall.EACCES, os.Getuid())
	case err != nil:
		return fmt.Errorf("%w; correct the path", errors.Unwrap(err))
	case info.IsDir():
		return fmt.Errorf("is a directory, not a socket: Docker makes a directory when the host has no such socket; remove it, start tailscaled, and %s", mountRemedy(path))
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("is a file, not a socket; remove it, start tailscaled, and %s", mountRemedy(path))
	}
	return nil
}

// dialSocket connects to the socket once. The client's own dialer waits for up to
// five seconds while the socket is not there, and so delays the first state of the
// source.
func dialSocket(path string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
}

// explainSocket returns an error of a question to tailscaled as a message for
// operators.
func (t *tailscaled) explainSocket(what string, err error) error {
	if request, ok := errors.AsType[*url.Error](err); ok {
		err = request.Err // without the URL, which has the key of the node in question
	}
	if _, ok := errors.AsType[*net.OpError](err); !ok {
		if ended := errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled); ended {
			return fmt.Errorf("%s: %w", what, err)
		}
		return fmt.Errorf("%s: %s; %s", what, shortLine(strings.TrimSpace(err.Error())), isTailscaled)
	}
	problem := CheckSocket(t.socket)
	switch {
	case errors.Is(problem, fs.ErrNotExist):
		return fmt.Errorf("%s: %w; start tailscaled; in a container, %s; %s", what, problem, mountRemedy(t.socket), staleRemedy)
	case problem != nil:
		return fmt.Errorf("%s: %w", what, problem)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%s: %w; start tailscaled; in a container, %s, not the socket, which tailscaled replaces; %s", what, syscall.ECONNREFUSED, mountRemedy(t.socket), staleRemedy)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: %w: derpd runs as uid %d, which must be able to write to the socket", what, syscall.EACCES, os.Getuid())
	}
	return fmt.Errorf("%s: %w", what, err)
}
