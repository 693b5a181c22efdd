//go:build !linux

package relay

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// rawRead reads from a socket in non-blocking mode.
func rawRead(fd uintptr, p []byte) (int, syscall.Errno) { return call(unix.Read, fd, p) }

// rawWrite writes to a socket in non-blocking mode.
func rawWrite(fd uintptr, p []byte) (int, syscall.Errno) { return call(unix.Write, fd, p) }

func call(do func(int, []byte) (int, error), fd uintptr, p []byte) (int, syscall.Errno) {
	for {
		n, err := do(int(fd), p)
		if err == nil {
			return n, 0
		}
		if errno, _ := errors.AsType[syscall.Errno](err); errno != unix.EINTR {
			return 0, errno
		}
	}
}

// hungUp is always false: these systems have no POLLRDHUP. The reader sees the end
// after the bytes before it.
func hungUp(uintptr) bool { return false }
