package filewatch_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"derpd/internal/filewatch"
)

// interval is the time between two readings, as the documents promise it.
const interval = 2 * time.Second

// watch runs a watch of the files in a bubble until the end of the test, and
// counts its calls of Changed. It returns after the call at the start.
func watch(t *testing.T, paths ...string) (calls *atomic.Int32) {
	t.Helper()
	calls = new(atomic.Int32)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- filewatch.Run(ctx, filewatch.Config{Paths: paths, Changed: func() { calls.Add(1) }}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	synctest.Wait()
	want(t, calls, 0, "before the second reading")
	pass(interval)
	want(t, calls, 1, "at the start")
	return calls
}

func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func want(t *testing.T, calls *atomic.Int32, n int32, when string) {
	t.Helper()
	if got := calls.Load(); got != n {
		t.Fatalf("%s: %d calls of Changed, want %d", when, got, n)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Each way in which programs replace a file is one change.
func TestReplaced(t *testing.T) {
	for name, replace := range map[string]func(t *testing.T, dir string) error{
		"written": func(_ *testing.T, dir string) error {
			return os.WriteFile(filepath.Join(dir, "file"), []byte("new"), 0o600)
		},
		"written with the old time and size": func(t *testing.T, dir string) error {
			path := filepath.Join(dir, "file")
			info, err := os.Stat(path)
			if err != nil {
				return err
			}
			write(t, path, "OLD")
			return os.Chtimes(path, info.ModTime(), info.ModTime())
		},
		"renamed": func(t *testing.T, dir string) error {
			write(t, filepath.Join(dir, "file.tmp"), "new")
			return os.Rename(filepath.Join(dir, "file.tmp"), filepath.Join(dir, "file"))
		},
		"removed": func(_ *testing.T, dir string) error { return os.Remove(filepath.Join(dir, "file")) },
		"linked to nothing": func(_ *testing.T, dir string) error {
			return errors.Join(os.Symlink("elsewhere", filepath.Join(dir, "link")), os.Rename(filepath.Join(dir, "link"), filepath.Join(dir, "file")))
		},
		"in a folder that a link names": func(t *testing.T, dir string) error {
			if err := os.Mkdir(filepath.Join(dir, "other"), 0o700); err != nil {
				return err
			}
			write(t, filepath.Join(dir, "other", "file"), "new")
			return errors.Join(os.Symlink("other", filepath.Join(dir, "link")), os.Rename(filepath.Join(dir, "link"), filepath.Join(dir, "current")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				write(t, filepath.Join(dir, "file"), "old")
				if err := os.Symlink(".", filepath.Join(dir, "current")); err != nil {
					t.Fatal(err)
				}
				calls := watch(t, filepath.Join(dir, "current", "file"))
				pass(time.Hour)
				want(t, calls, 1, "without a change")
				if err := replace(t, dir); err != nil {
					t.Fatal(err)
				}
				pass(2 * interval)
				want(t, calls, 2, "after the change")
				pass(time.Hour)
				want(t, calls, 2, "an hour after the change")
			})
		})
	}
}

// A file that appears is a change, in a folder that appears too.
func TestAppears(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "later", "file")
		calls := watch(t, path)
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			t.Fatal(err)
		}
		pass(time.Minute)
		want(t, calls, 1, "the folder appeared")
		write(t, path, "")
		pass(2 * interval)
		want(t, calls, 2, "the file appeared")
	})
}

// Two files written one after the other are one change. A reverted change is none.
func TestSettles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		cert, key := filepath.Join(dir, "cert"), filepath.Join(dir, "key")
		write(t, cert, "old")
		write(t, key, "old")
		calls := watch(t, cert, key)
		pass(interval / 2)
		write(t, cert, "new")
		pass(interval)
		want(t, calls, 1, "one reading after the first file")
		write(t, key, "new")
		pass(interval)
		want(t, calls, 1, "one reading after the second file")
		pass(interval)
		want(t, calls, 2, "two readings after the second file")

		write(t, cert, "newest")
		pass(interval)
		write(t, cert, "new")
		pass(time.Minute)
		want(t, calls, 2, "the change was taken back")

		// The same bytes, divided in another way.
		write(t, cert, "a<nil>\nb")
		write(t, key, "c")
		pass(2 * interval)
		want(t, calls, 3, "both files were written")
		write(t, cert, "a")
		write(t, key, "b<nil>\nc")
		pass(2 * interval)
		want(t, calls, 4, "bytes moved to the other file")
	})
}

// The fingerprint changes with each byte, and with the file that contains it.
func TestFingerprint(t *testing.T) {
	dir := t.TempDir()
	paths := []string{filepath.Join(dir, "a"), filepath.Join(dir, "b")}
	seen := make(map[filewatch.Fingerprint]string)
	for _, contents := range [][]string{{}, {"", ""}, {"ab", "c"}, {"a", "bc"}, {"abc", ""}, {"", "abc"}, {"abd", ""}, {"b", "ac"}} {
		for i, path := range paths {
			_ = os.Remove(path)
			if len(contents) > i {
				if err := os.WriteFile(path, []byte(contents[i]), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		now := filewatch.Read(paths)
		if other, ok := seen[now]; ok {
			t.Errorf("%q has the fingerprint of %s", contents, other)
		}
		if again := filewatch.Read(paths); again != now {
			t.Errorf("%q has two fingerprints", contents)
		}
		seen[now] = strings.Join(contents, "|")
	}
}

// Changed is called after a reading by the caller too, if the files differ from that
// reading. They may be back at the content of the last call.
func TestSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		write(t, file, "old")
		var mu sync.Mutex
		seen, calls := filewatch.Read([]string{file}), 0
		read := func() {
			mu.Lock()
			defer mu.Unlock()
			seen = filewatch.Read([]string{file})
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			done <- filewatch.Run(ctx, filewatch.Config{
				Paths: []string{file}, Changed: func() { calls++; read() },
				Seen: func() filewatch.Fingerprint { mu.Lock(); defer mu.Unlock(); return seen },
			})
		}()
		counted := func(n int, when string) {
			t.Helper()
			pass(time.Minute)
			if calls != n {
				t.Errorf("%s: %d calls of Changed, want %d", when, calls, n)
			}
		}
		counted(0, "unchanged since the caller's reading")
		write(t, file, "new")
		counted(1, "changed")
		write(t, file, "newest")
		read()
		counted(1, "read by the caller")
		write(t, file, "new")
		counted(2, "back")
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
