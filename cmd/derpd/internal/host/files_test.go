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
