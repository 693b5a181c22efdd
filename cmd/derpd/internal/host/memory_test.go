package host

import (
	"testing"
	"testing/fstest"
)

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
