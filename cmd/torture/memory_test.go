//go:build linux

package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// Both versions of cgroups have a limit, a peak, and a count of kills.
func TestMemoryGroup(t *testing.T) {
	write := func(text string, path ...string) {
		t.Helper()
		file := filepath.Join(path...)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		start               [2]string // file and text of a machine with this version
		limit, peak, events string
	}{
		"version 1": {[2]string{"memory/memory.limit_in_bytes", "max"}, "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"},
		"version 2": {[2]string{"cgroup.subtree_control", "cpu memory\n"}, "memory.max", "memory.peak", "memory.events"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			write(c.start[1], root, c.start[0])
			g, err := newMemoryGroup(root, 64<<20)
			if err != nil {
				t.Fatal(err)
			}
			if limit, err := os.ReadFile(g.file(c.limit)); err != nil || string(limit) != "67108864" {
				t.Errorf("limit %q, %v; want 64 MiB", limit, err)
			}
			write("1234567\n", g.file(c.peak))
			write("under_oom 0\noom_kill 3\noom_group_kill 1\n", g.file(c.events))
			if peak, err := g.peak(); err != nil || peak != 1234567 {
				t.Errorf("peak %d, %v", peak, err)
			}
			if kills, err := g.kills(); err != nil || kills != 3 {
				t.Errorf("%d kills, %v; want 3", kills, err)
			}
			write("other 1\n", g.file(c.events))
			if kills, err := g.kills(); err == nil {
				t.Errorf("%d kills of a file without a count", kills)
			}
		})
	}
	root := t.TempDir()
	write("cpu pids\n", root, groupsV2.controllers)
	if _, err := newMemoryGroup(root, 1); !errors.As(err, new(notRun)) {
		t.Errorf("a machine without the controller: %v, want a reason not to run", err)
	}
}
