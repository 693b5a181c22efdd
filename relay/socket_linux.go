package relay

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rawRead reads from a socket in non-blocking mode. p is not empty.
func rawRead(fd uintptr, p []byte) (int, syscall.Errno) { return rawCall(unix.SYS_READ, fd, p) }

// rawWrite writes to a socket in non-blocking mode. p is not empty.
func rawWrite(fd uintptr, p []byte) (int, syscall.Errno) { return rawCall(unix.SYS_WRITE, fd, p) }

func rawCall(call, fd uintptr, p []byte) (int, syscall.Errno) {
	for {
		n, _, errno := unix.RawSyscall(call, fd, uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
		switch errno {
		case 0:
			return int(n), 0
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// hungUp reports whether the peer has closed or reset the connection.
func hungUp(fd uintptr) bool {
	polled := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	n, err := unix.Poll(polled, 0)
	return err == nil && n > 0 && polled[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
}
