package main

import (
	"io/fs"
	"math"
	"os"
	"path"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/rs/zerolog"
)

// memoryShare is the part of the container's memory, in percent, that Go may
// use: the rest is for the sockets and the binary.
const memoryShare = 90

// limitMemory makes Go collect garbage more often near the limit of the
// container, rather than be killed by it. A GOMEMLIMIT that is set stays.
func limitMemory(log zerolog.Logger) {
	if debug.SetMemoryLimit(-1) != math.MaxInt64 {
		return
	}
	if limit, ok := memoryOfCgroup(os.DirFS("/")); ok {
		limit = limit / 100 * memoryShare
		debug.SetMemoryLimit(limit)
		log.Debug().Int64("bytes", limit).Msg("memory limit, by the container's")
	}
}

// memoryOfCgroup is the lowest memory limit, in bytes, of this process's cgroup
// and those around it, of both versions (cgroups(7)). In a container, the
// cgroup of the container is mounted in place of the root.
func memoryOfCgroup(root fs.FS) (limit int64, ok bool) {
	data, err := fs.ReadFile(root, "proc/self/cgroup")
	if err != nil {
		return 0, false
	}
	limit = math.MaxInt64
	for line := range strings.Lines(string(data)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3) // hierarchy, controllers, path
		if len(fields) != 3 {
			continue
		}
		var mount, file string
		switch fields[1] {
		case "":
			mount, file = "sys/fs/cgroup", "memory.max"
		case "memory":
			mount, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
		default:
			continue
		}
		for group := path.Clean("/" + fields[2]); ; group = path.Dir(group) {
			if data, err := fs.ReadFile(root, path.Join(mount, group, file)); err == nil {
				// None is "max", or in version 1 a number above all memory.
				if n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64); err == nil && n > 0 && n < 1<<60 {
					limit = min(limit, n)
				}
			}
			if group == "/" {
				break
			}
		}
	}
	return limit, limit != math.MaxInt64
}
