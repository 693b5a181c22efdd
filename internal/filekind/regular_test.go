package filekind_test

import (
	"bytes"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"derpd/internal/filekind"
)

// kinds are paths that are no regular file, with what an error calls them.
func kinds(t *testing.T) map[string]string {
	t.Helper()
	dir := t.TempDir()
	pipe, socket, link := filepath.Join(dir, "pipe"), filepath.Join(dir, "socket"), filepath.Join(dir, "link")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	ln, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	if err := os.Symlink("/dev/zero", link); err != nil {
		t.Fatal(err)
	}
	return map[string]string{
		dir: "is a directory", pipe: "is a pipe", socket: "is a socket",
		"/dev/zero": "is a device", "/dev/full": "is a device", link: "is a device",
	}
}

// Read ends at once for every kind of file.
func TestReadRefusesOtherKinds(t *testing.T) {
	for path, want := range kinds(t) {
		ended := make(chan error, 1)
		go func() {
			_, err := filekind.Read(path)
			ended <- err
		}()
		select {
		case err := <-ended:
			if _, ok := errors.AsType[*fs.PathError](err); !ok || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q", path, err, want)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%s: Read waits", path)
		}
	}
}

// Read reads up to 1 MiB, through links and from file systems that do not know sizes.
func TestReadSizes(t *testing.T) {
	dir := t.TempDir()
	path, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	if err := os.Symlink("file", link); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{0, 1, filekind.MaxSize, filekind.MaxSize + 1} {
		want := bytes.Repeat([]byte("k"), size)
		if err := os.WriteFile(path, want, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := filekind.Read(link)
		if size > filekind.MaxSize {
			if err == nil || !strings.Contains(err.Error(), "more than 1048576 bytes") {
				t.Errorf("%d bytes: %v", size, err)
			}
		} else if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes: got %d, %v", size, len(got), err)
		}
	}
	if data, err := filekind.Read("/proc/self/status"); err != nil || len(data) == 0 {
		t.Errorf("/proc: %d bytes, %v", len(data), err)
	}
}
