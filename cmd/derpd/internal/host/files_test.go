package host

import (
	"strings"
	"testing"
)

func TestOpenFilesWarning(t *testing.T) {
	for limit, warned := range map[uint64]bool{1024: true, minOpenFiles - 1: true, minOpenFiles: false, 1 << 20: false} {
		got := openFilesWarning(limit)
		if (got != "") != warned {
			t.Errorf("limit %d: %q, want a warning: %t", limit, got, warned)
		}
		if warned && !strings.Contains(got, "LimitNOFILE=65536") {
			t.Errorf("limit %d: %q does not say how to raise it", limit, got)
		}
	}
}

func TestLastDescriptor(t *testing.T) {
	for _, tt := range []struct {
		limit uint64
		part  int
		want  int
	}{
		{64, 1, 47},
		{64, 2, 55},
		{256, 1, 191},
		{256, 2, 223},
		{65536, 1, 65471},
		{1<<64 - 1, 1, 1<<30 - 65}, // RLIM_INFINITY
	} {
		if got := lastDescriptor(tt.limit, tt.part); got != tt.want {
			t.Errorf("limit %d, part %d: %d, want %d", tt.limit, tt.part, got, tt.want)
		}
	}
}

// All connections together leave descriptors below the last one of a listener.
func TestMaxConnections(t *testing.T) {
	for limit, want := range map[uint64]int{64: 32, 256: 128, 1024: 896, 65536: 65408, 1<<64 - 1: 1<<30 - 128} {
		got := maxConnections(limit)
		if got != want {
			t.Errorf("limit %d: %d connections, want %d", limit, got, want)
		}
		if last := lastDescriptor(limit, 1); got > last-15 {
			t.Errorf("limit %d: %d connections reach the last descriptor %d", limit, got, last)
		}
		if limit >= 256 && OpenFilesFor(got) != int(min(limit, maxDescriptors)) {
			t.Errorf("%d connections need %d open files, want %d", got, OpenFilesFor(got), limit)
		}
	}
	if MaxConnections() < 32 {
		t.Errorf("this process may have %d connections", MaxConnections())
	}
}
