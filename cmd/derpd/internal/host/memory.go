package host

import (
	"io/fs"
	"math"
	"os"
	"path"
	"runtime/debug"
	"strconv"
	"strings"
)

// memoryPercent is the part of the container's memory that Go may use. The rest
// is for socket buffers and the binary.
const memoryPercent = 90

// LimitMemory sets Go's memory limit below the container's limit, so that Go
// collects garbage more often instead of being killed. It returns the limit in
// bytes, or 0 where the container has none. A limit set by GOMEMLIMIT stays.
func LimitMemory() int64 { return limitMemory(os.DirFS("/")) }

func limitMemory(root fs.FS) int64 {
	if debug.SetMemoryLimit(-1) != math.MaxInt64 {
		return 0
	}
	limit, ok := cgroupMemory(root)
	if !ok {
		return 0
	}
	limit = limit / 100 * memoryPercent
	debug.SetMemoryLimit(limit)
	return limit
}

// unknownMemory stands for the memory of a machine that says nothing about it.
const unknownMemory = 1 << 30

// Memory is the memory, in bytes, that this process can count on: the limit of its
// container or of GOMEMLIMIT, or else half of the machine's memory.
func Memory() int64 { return memory(os.DirFS("/")) }

func memory(root fs.FS) int64 {
	limit, limited := cgroupMemory(root)
	if ofGo := debug.SetMemoryLimit(-1); ofGo != math.MaxInt64 {
		// As much as a container whose limit would lead to this one.
		limit, limited = min(limit, ofGo/memoryPercent*100), true
	}
	if machine, ok := machineMemory(root); ok {
		if !limited {
			return machine / 2
		}
		return min(limit, machine)
	}
	if !limited {
		return unknownMemory
	}
	return limit
}

// machineMemory is the memory of the machine in bytes; see proc_meminfo(5).
func machineMemory(root fs.FS) (int64, bool) {
	data, err := fs.ReadFile(root, "proc/meminfo")
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "MemTotal:" {
			kib, err := strconv.ParseInt(fields[1], 10, 64)
			return kib << 10, err == nil && kib > 0
		}
	}
	return 0, false
}

// cgroupMemory is the lowest memory limit, in bytes, of this process's cgroup
// and the cgroups around it, or the highest number. It reads both versions of
// cgroups(7). A container sees its own cgroup mounted as the root.
func cgroupMemory(root fs.FS) (limit int64, ok bool) {
	limit = math.MaxInt64
	data, err := fs.ReadFile(root, "proc/self/cgroup")
	if err != nil {
		return limit, false
	}
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
				// "No limit" is "max", or in version 1 a number above any
				// real memory.
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
