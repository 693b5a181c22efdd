package filekind_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"derpd/internal/filekind"
)

// A path that leads to no file gives an error at once.
func TestReadFile(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(
		syscall.Mkfifo(path("pipe"), 0o600),
		os.Symlink("/dev/zero", path("zero")),
		os.Symlink("loop", path("loop")),
		os.WriteFile(path("limit"), make([]byte, 4<<20), 0o600),
		os.WriteFile(path("large"), make([]byte, 4<<20+1), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"pipe":  path("pipe") + " is a pipe or a device; put a file there",
		"zero":  path("zero") + " is a pipe or a device; put a file there",
		"large": path("large") + " has more than 4 MiB; put the right file there",
		"loop":  "too many levels of symbolic links",
		"none":  "no such file or directory",
		".":     "is a directory",
	} {
		if _, err := filekind.ReadFile(path(name)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if data, err := filekind.ReadFile(path("limit")); err != nil || len(data) != 4<<20 {
		t.Errorf("%d bytes, %v", len(data), err)
	}
	if _, err := filekind.ReadFile(path("none")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
