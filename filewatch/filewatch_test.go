package filewatch_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"derpd/filewatch"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start runs a watch until the end of the test. What it returns tells how often
// it looked, the first look done.
func start(t *testing.T, c filewatch.Config) <-chan struct{} {
	t.Helper()
	looks := make(chan struct{}, 1000)
	c.Look = func() { looks <- struct{}{} }
	c.Log = zerolog.Nop()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- filewatch.Run(ctx, c) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	await(t, looks, "the first look")
	return looks
}

func await(t *testing.T, looks <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-looks:
	case <-time.After(30 * time.Second):
		t.Fatalf("no look: %s", what)
	}
}

// Each way in which programs replace files is noticed, without polling.
func TestEvents(t *testing.T) {
	for name, replace := range map[string]func(dir string) error{
		"written": func(dir string) error { return os.WriteFile(filepath.Join(dir, "file"), []byte("new"), 0o600) },
		"renamed": func(dir string) error {
			if err := os.WriteFile(filepath.Join(dir, "file.tmp"), []byte("new"), 0o600); err != nil {
				return err
			}
			return os.Rename(filepath.Join(dir, "file.tmp"), filepath.Join(dir, "file"))
		},
		"removed": func(dir string) error { return os.Remove(filepath.Join(dir, "file")) },
		"linked": func(dir string) error {
			if err := os.Symlink("elsewhere", filepath.Join(dir, "link")); err != nil {
				return err
			}
			return os.Rename(filepath.Join(dir, "link"), filepath.Join(dir, "file"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "file"), []byte("old"), 0o600); err != nil {
				t.Fatal(err)
			}
			looks := start(t, filewatch.Config{Paths: []string{filepath.Join(dir, "file")}, Poll: time.Hour})
			if err := replace(dir); err != nil {
				t.Fatal(err)
			}
			await(t, looks, name)
		})
	}
}

// Where there is no directory to watch, the files are polled.
func TestPoll(t *testing.T) {
	looks := start(t, filewatch.Config{Paths: []string{filepath.Join(t.TempDir(), "later", "file")}, Poll: 10 * time.Millisecond})
	await(t, looks, "the second by polling")
	await(t, looks, "the third by polling")
}
