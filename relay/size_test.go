package relay

import (
	"testing"
	"unsafe"
)

// Each idle connection has one of these values. One more byte would take the next size
// class of the allocator, which is 16 to 32 bytes larger.
func TestSizeOfIdleConnection(t *testing.T) {
	if unsafe.Sizeof(uintptr(0)) != 8 {
		t.Skip("sizes are those of 64 bits")
	}
	for _, value := range []struct {
		name      string
		size, max uintptr
	}{
		{"session", unsafe.Sizeof(session{}), 288},
		{"socketConn", unsafe.Sizeof(socketConn{}), 160},
		{"limitedNode", unsafe.Sizeof(limitedNode{}), 64},
	} {
		if value.size > value.max {
			t.Errorf("%s has %d bytes, want at most %d", value.name, value.size, value.max)
		}
	}
}
