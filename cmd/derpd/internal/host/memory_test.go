package host

import (
	"math"
	"runtime/debug"
	"testing"
	"testing/fstest"
)

// The limit leaves a tenth of the container's memory, and one that is set already
// stays.
func TestLimitMemory(t *testing.T) {
	before := debug.SetMemoryLimit(math.MaxInt64)
	t.Cleanup(func() { debug.SetMemoryLimit(before) })
	root := fstest.MapFS{"proc/self/cgroup": {Data: []byte("0::/\n")}}
	if got := limitMemory(root); got != 0 || debug.SetMemoryLimit(-1) != math.MaxInt64 {
		t.Errorf("without a limit of the container: %d, %d", got, debug.SetMemoryLimit(-1))
	}
	root["sys/fs/cgroup/memory.max"] = &fstest.MapFile{Data: []byte("1000000000\n")}
	if got := limitMemory(root); got != 900_000_000 || debug.SetMemoryLimit(-1) != got {
		t.Errorf("in a container with 1 GB: %d, and Go's limit is %d", got, debug.SetMemoryLimit(-1))
	}
	debug.SetMemoryLimit(500_000_000)
	if got := limitMemory(root); got != 0 || debug.SetMemoryLimit(-1) != 500_000_000 {
		t.Errorf("with GOMEMLIMIT: %d, and Go's limit is %d", got, debug.SetMemoryLimit(-1))
	}
}

func TestCgroupMemory(t *testing.T) {
	for name, tt := range map[string]struct {
		files map[string]string
		want  int64 // 0: none
	}{
		"no cgroups": {nil, 0},
		"a container, version 2": {map[string]string{
			"proc/self/cgroup":         "0::/\n",
			"sys/fs/cgroup/memory.max": "268435456\n",
		}, 256 << 20},
		"without a limit": {map[string]string{
			"proc/self/cgroup":         "0::/\n",
			"sys/fs/cgroup/memory.max": "max\n",
		}, 0},
		"a unit of systemd, in a slice with less": {map[string]string{
			"proc/self/cgroup": "0::/system.slice/derpd.service\n",
			"sys/fs/cgroup/system.slice/derpd.service/memory.max": "268435456\n",
			"sys/fs/cgroup/system.slice/memory.max":               "134217728\n",
		}, 128 << 20},
		"a unit of systemd, in a slice with more": {map[string]string{
			"proc/self/cgroup": "0::/system.slice/derpd.service\n",
			"sys/fs/cgroup/system.slice/derpd.service/memory.max": "134217728\n",
			"sys/fs/cgroup/system.slice/memory.max":               "268435456\n",
		}, 128 << 20},
		"a container, version 1": {map[string]string{
			"proc/self/cgroup":                           "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes": "268435456\n",
		}, 256 << 20},
		"version 1 without a limit": {map[string]string{
			"proc/self/cgroup":                           "4:memory:/\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
		}, 0},
		"nonsense": {map[string]string{
			"proc/self/cgroup":         "0::/../..\nnonsense\n",
			"sys/fs/cgroup/memory.max": "-5",
		}, 0},
	} {
		root := make(fstest.MapFS)
		for path, content := range tt.files {
			root[path] = &fstest.MapFile{Data: []byte(content)}
		}
		got, ok := cgroupMemory(root)
		if ok != (tt.want != 0) || ok && got != tt.want {
			t.Errorf("%s: %d, %v, want %d", name, got, ok, tt.want)
		}
	}
}

// The memory is the lowest limit, or else half of the machine's.
func TestMemory(t *testing.T) {
	before := debug.SetMemoryLimit(math.MaxInt64)
	t.Cleanup(func() { debug.SetMemoryLimit(before) })
	const machine = "MemTotal:        4000000 kB\nMemFree:          100000 kB\n"
	for name, tt := range map[string]struct {
		meminfo, max string
		ofGo         int64 // 0: none
		want         int64
	}{
		"nothing":                       {want: unknownMemory},
		"a machine":                     {meminfo: machine, want: 2_000_000 << 10},
		"a container":                   {meminfo: machine, max: "268435456\n", want: 256 << 20},
		"a container with more":         {meminfo: machine, max: "8589934592\n", want: 4_000_000 << 10},
		"without a limit":               {meminfo: machine, max: "max\n", want: 2_000_000 << 10},
		"a container that says no more": {max: "268435456\n", want: 256 << 20},
		"GOMEMLIMIT":                    {meminfo: machine, ofGo: 90_000_000, want: 100_000_000},
		"GOMEMLIMIT in a container":     {meminfo: machine, max: "268435456\n", ofGo: 90_000_000, want: 100_000_000},
		"nonsense":                      {meminfo: "MemTotal: x kB\nMemTotal\n", want: unknownMemory},
	} {
		root := fstest.MapFS{"proc/meminfo": {Data: []byte(tt.meminfo)}}
		if tt.max != "" {
			root["proc/self/cgroup"] = &fstest.MapFile{Data: []byte("0::/\n")}
			root["sys/fs/cgroup/memory.max"] = &fstest.MapFile{Data: []byte(tt.max)}
		}
		debug.SetMemoryLimit(math.MaxInt64)
		if tt.ofGo > 0 {
			debug.SetMemoryLimit(tt.ofGo)
		}
		if got := memory(root); got != tt.want {
			t.Errorf("%s: %d, want %d", name, got, tt.want)
		}
	}
	// The limit that LimitMemory sets changes nothing.
	debug.SetMemoryLimit(math.MaxInt64)
	root := fstest.MapFS{"proc/self/cgroup": {Data: []byte("0::/\n")}, "sys/fs/cgroup/memory.max": {Data: []byte("1000000000")}}
	if limitMemory(root); memory(root) != 1_000_000_000 {
		t.Errorf("after LimitMemory: %d", memory(root))
	}
}
