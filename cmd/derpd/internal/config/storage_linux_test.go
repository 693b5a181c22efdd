package config

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// nobody is a user without privileges, as in the image.
const nobody = 65532

// asNobody runs f as a user without privileges, and returns that user's ID.
func asNobody(t *testing.T, f func()) int {
	t.Helper()
	if os.Getuid() != 0 {
		f()
		return os.Getuid()
	}
	failed := make(chan error, 1)
	go func() {
		// The thread is never unlocked, so that it ends with this goroutine.
		runtime.LockOSThread()
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
			failed <- errno
			return
		}
		f()
		failed <- nil
	}()
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	return nobody
}

func TestDirectoryOfSomebodyElse(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	locked, open := filepath.Join(dir, "locked"), filepath.Join(dir, "open")
	for path, mode := range map[string]os.FileMode{locked: 0o555, open: 0o777} {
		if err := os.Mkdir(path, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	p := new(problems)
	var inLocked, inOpen directory
	uid := asNobody(t, func() {
		inLocked = checkDirectory(p, "DERP_DATA_DIR", filepath.Join(locked, "not", "yet"))
		inOpen = checkDirectory(p, "DERP_DATA_DIR", filepath.Join(open, "not", "yet"))
	})
	want := fmt.Sprintf("%s cannot be written to by uid %d: permission denied; make %s for this user, or set DERP_DATA_DIR to a directory of this user", locked, uid, filepath.Join(locked, "not", "yet"))
	if fmt.Sprint(inLocked.readOnly) != want || inLocked.usable {
		t.Errorf("got %+v, want %s", inLocked, want)
	}
	if inOpen.readOnly != nil || !inOpen.usable || len(p.found) > 0 {
		t.Errorf("got %+v, %v", inOpen, p.found)
	}
}

func TestFileOfSomebodyElse(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "secret")
	if err := os.WriteFile(path, []byte("x"), 0o000); err != nil {
		t.Fatal(err)
	}
	p := new(problems)
	uid := asNobody(t, func() { readEnvironment([]string{"DERP_ACME_EAB_KEY_FILE=" + path}, p) })
	want := fmt.Sprintf("DERP_ACME_EAB_KEY_FILE: open %s: permission denied; derpd runs as uid %d, which must be able to read it (a secret with mode 0600 that root owns cannot be)", path, uid)
	if got := fmt.Sprint(p.err(nil)); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestReadOnlyMount(t *testing.T) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		if info, err := os.Stat(fields[1]); err != nil || !info.IsDir() || !strings.HasPrefix(fields[3]+",", "ro,") {
			continue
		}
		d := checkDirectory(new(problems), "DERP_DATA_DIR", fields[1])
		want := fmt.Sprintf("%s cannot be written to by uid %d: read-only file system; mount it for writing", fields[1], os.Getuid())
		if os.Getuid() == 0 && fmt.Sprint(d.readOnly) != want {
			t.Errorf("got %v, want %s", d.readOnly, want)
		}
		return
	}
	t.Skip("nothing is mounted read-only here")
}
