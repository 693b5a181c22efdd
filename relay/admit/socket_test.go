package admit

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// shortDir makes a directory whose path leaves room for a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "admit")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// leaveSocket makes a socket on which nobody listens.
func leaveSocket(t *testing.T, path string) {
	t.Helper()
	ln, err := new(net.ListenConfig).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
}

// A socket without a tailscaled is reported at once, with the fix.
func TestTailscaledSocket(t *testing.T) {
	const mount = "mount the directory, as compose.yaml does (DIR:DIR:ro)"
	const stale = "RuntimeDirectoryPreserve=yes in tailscaled.service keeps that mount valid over restarts"
	for _, tt := range []struct {
		name  string
		setup func(t *testing.T, path string) error
		want  string
	}{
		{
			"nothing there", func(*testing.T, string) error { return nil },
			"asking tailscaled: no such file or directory; start tailscaled; in a container, " + mount + "; " + stale,
		},
		{
			"a link to nothing", func(_ *testing.T, path string) error { return os.Symlink("/nonexistent/socket", path) },
			"asking tailscaled: the link leads to /nonexistent/socket: no such file or directory; mount the directory that it leads to, or correct the path; start tailscaled; in a container, " + mount + "; " + stale,
		},
		{
			"a socket without a listener", func(t *testing.T, path string) error { leaveSocket(t, path); return nil },
			"asking tailscaled: connection refused; start tailscaled; in a container, " + mount + ", not the socket, which tailscaled replaces; " + stale,
		},
		{
			"a directory", func(_ *testing.T, path string) error { return os.Mkdir(path, 0o700) },
			"asking tailscaled: is a directory, not a socket: Docker makes a directory when the host has no such socket; remove it, start tailscaled, and " + mount,
		},
		{
			"a file", func(_ *testing.T, path string) error { return os.WriteFile(path, nil, 0o600) },
			"asking tailscaled: is a file, not a socket; remove it, start tailscaled, and " + mount,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := shortDir(t)
			path := filepath.Join(dir, "socket")
			if err := tt.setup(t, path); err != nil {
				t.Fatal(err)
			}
			source := Tailscaled(path, time.Hour)
			began := time.Now()
			if got, want := answers(t, source, newNode()), strings.ReplaceAll(tt.want, "DIR", dir); got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
			if took := time.Since(began); took > 200*time.Millisecond {
				t.Errorf("the error came after %s", took)
			}
		})
	}
}

func TestCheckSocket(t *testing.T) {
	dir := shortDir(t)
	socket := filepath.Join(dir, "socket")
	leaveSocket(t, socket)
	if err := os.Symlink("socket", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{socket, filepath.Join(dir, "link")} {
		if err := CheckSocket(path); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	if err := CheckSocket(filepath.Join(dir, "none", "socket")); !errors.Is(err, fs.ErrNotExist) || err.Error() != "no such file or directory" {
		t.Error(err)
	}
	if err := CheckSocket(filepath.Join(socket, "socket")); errors.Is(err, fs.ErrNotExist) || err == nil || !strings.HasPrefix(err.Error(), "a part of the path is a file, not a directory; ") {
		t.Error(err)
	}
	if err := CheckSocket("/" + strings.Repeat("a", 300)); err == nil || err.Error() != "file name too long; correct the path" {
		t.Error(err)
	}
}

// Another program behind the socket admits nobody, and the message asks about it.
func TestSocketOfAnotherProgram(t *testing.T) {
	for answer, want := range map[string]string{
		"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone": "asking tailscaled for its status: 404 Not Found: none; is this the socket of tailscaled?",
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}":          "the status has no state; is this the socket of tailscaled?",
		"+OK\r\n": "asking tailscaled: net/http: HTTP/1.x transport connection broken: malformed HTTP response \"+OK\"; is this the socket of tailscaled?",
	} {
		path := filepath.Join(shortDir(t), "socket")
		ln, err := new(net.ListenConfig).Listen(t.Context(), "unix", path)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				_, _ = conn.Read(make([]byte, 4096))
				_, _ = conn.Write([]byte(answer))
				_ = conn.Close()
			}
		}()
		if got := answers(t, Tailscaled(path, time.Hour), newNode()); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		_ = ln.Close()
		<-ended
	}
}
