//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// memoryGroup is a cgroup with a limit of memory, of either version of cgroups(7).
type memoryGroup struct {
	dir  string
	kind groupFiles
}

// groupFiles are the files of a version of cgroups.
type groupFiles struct {
	mount, controllers, limit, peak, events string // mount is below groupRoot
}

// Version 1 counts the kernel's memory too, sockets included, as version 2 does.
var (
	groupsV1 = groupFiles{"memory", "", "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"}
	groupsV2 = groupFiles{".", "cgroup.subtree_control", "memory.max", "memory.peak", "memory.events"}
)

const groupRoot = "/sys/fs/cgroup"

// newMemoryGroup makes a cgroup below root. Its error is [notRun] where the machine has
// none.
func newMemoryGroup(root string, limit int64) (*memoryGroup, error) {
	kind := groupsV2
	if _, err := os.Stat(filepath.Join(root, groupsV1.mount, groupsV1.limit)); err == nil {
		kind = groupsV1
	} else if controllers, _ := os.ReadFile(filepath.Join(root, kind.mount, kind.controllers)); !slices.Contains(strings.Fields(string(controllers)), "memory") {
		return nil, notRun("this machine has no cgroup with a limit of memory")
	}
	dir, err := os.MkdirTemp(filepath.Join(root, kind.mount), "derpd-torture-")
	if err != nil {
		return nil, notRun(fmt.Sprintf("this machine makes no cgroup: %v", err))
	}
	g := &memoryGroup{dir: dir, kind: kind}
	if err := os.WriteFile(g.file(kind.limit), strconv.AppendInt(nil, limit, 10), 0o600); err != nil {
		g.remove()
		return nil, notRun(fmt.Sprintf("this machine sets no limit of memory: %v", err))
	}
	return g, nil
}

func (g *memoryGroup) file(name string) string { return filepath.Join(g.dir, name) }

// join is the shell command with which a process enters the group.
func (g *memoryGroup) join() string { return "echo $$ >" + g.file("cgroup.procs") }

// kills returns how many processes of the group were killed for lack of memory.
func (g *memoryGroup) kills() (int64, error) { return g.event("oom_kill") }

func (g *memoryGroup) event(name string) (int64, error) {
	text, err := os.ReadFile(g.file(g.kind.events))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if key, value, _ := strings.Cut(strings.TrimSpace(line), " "); key == name {
			return strconv.ParseInt(value, 10, 64)
		}
	}
	return 0, errors.New(g.file(g.kind.events) + " has no " + name)
}

// peak is the most memory that the group had, in bytes.
func (g *memoryGroup) peak() (int64, error) {
	text, err := os.ReadFile(g.file(g.kind.peak))
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
}

// remove removes the group, which must have no process left.
func (g *memoryGroup) remove() { _ = os.Remove(g.dir) }
