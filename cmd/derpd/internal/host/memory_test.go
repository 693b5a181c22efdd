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
