//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"derpd/internal/testrelay"
)

// clock is the wall clock of one program: this machine's clock plus a shift. Changing
// the shift is a jump of the clock. Other programs keep their clock.
//
// A seccomp filter hands the program's calls of clock_gettime to this process, which
// answers them. The monotonic clock stays as it is, as after settimeofday.
type clock struct{ shift atomic.Int64 } // nanoseconds

// set moves the program's clock.
func (c *clock) set(shift time.Duration) { c.shift.Store(int64(shift)) }

// underClock is the first argument of the process that installs the filter and then
// executes the program.
const underClock = "under-clock"

// runUnder makes a program run under the clock from its next start on. The clock ends
// with the row.
func (l *lab) runUnder(ctx context.Context, c *clock, p *testrelay.Program) error {
	if runtime.GOARCH != "amd64" {
		return notRun("shifting the clock of one program needs amd64")
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	path := filepath.Join(l.Dir, "clock.sock")
	listener, err := new(net.ListenConfig).Listen(ctx, "unix", path)
	if err != nil {
		return err
	}
	l.onClose(func() { _ = listener.Close() })
	p.Args = append([]string{underClock, path, p.Path}, p.Args...)
	p.Path = self
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			if filter, err := receiveDescriptor(conn.(*net.UnixConn)); err == nil {
				go c.answer(filter)
			}
		}
	}()
	return nil
}

// receiveDescriptor returns the descriptor that the peer sends.
func receiveDescriptor(conn *net.UnixConn) (int, error) {
	defer func() { _ = conn.Close() }()
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return 0, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) == 0 {
		return 0, errors.Join(err, errors.New("no descriptor came"))
	}
	descriptors, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return 0, err
	}
	unix.CloseOnExec(descriptors[0])
	return descriptors[0], nil
}

// execUnderClock runs in the new process. The arguments are the path of the clock's
// socket, and the program with its own. It returns only if it fails.
func execUnderClock(ctx context.Context, args []string) error {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", args[0])
	if err != nil {
		return err
	}
	runtime.LockOSThread() // the filter is the thread's
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	const number, firstArgument = 0, 16 // offsets in struct seccomp_data
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 3, K: archPrctl},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 3, K: unix.SYS_CLOCK_GETTIME},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: firstArgument},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: unix.CLOCK_REALTIME},
		{Code: unix.BPF_RET, K: unix.SECCOMP_RET_USER_NOTIF},
		{Code: unix.BPF_RET, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	descriptor, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return os.NewSyscallError("seccomp", errno)
	}
	if _, _, err := conn.(*net.UnixConn).WriteMsgUnix([]byte{0}, unix.UnixRights(int(descriptor)), nil); err != nil {
		return err
	}
	return os.NewSyscallError("execve", unix.Exec(args[1], args[1:], os.Environ()))
}

// seccompNotif and seccompResponse are struct seccomp_notif and
// struct seccomp_notif_resp.
type seccompNotif struct {
	id         uint64
	pid, flags uint32
	nr         int32
	arch       uint32
	ip         uint64
	args       [6]uint64
}

type seccompResponse struct {
	id    uint64
	val   int64
	error int32
	flags uint32
}

const (
	archPrctl        = 158        // SYS_ARCH_PRCTL of amd64
	ioctlReceive     = 0xc0502100 // SECCOMP_IOCTL_NOTIF_RECV
	ioctlSend        = 0xc0182101 // SECCOMP_IOCTL_NOTIF_SEND
	continueTheCall  = 1          // SECCOMP_USER_NOTIF_FLAG_CONTINUE
	auxSysinfoEHDR   = 33         // AT_SYSINFO_EHDR, the vDSO
	auxIgnore        = 1          // AT_IGNORE
	startStack       = 28         // field of /proc/PID/stat
	largestArguments = 128 << 10
)

// answer answers the program's questions for the time until the program has ended.
func (c *clock) answer(listener int) {
	defer func() { _ = unix.Close(listener) }()
	for {
		ready := []unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(ready, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		if ready[0].Revents&unix.POLLIN == 0 {
			if ready[0].Revents != 0 {
				return
			}
			continue
		}
		var call seccompNotif
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(listener), ioctlReceive, uintptr(unsafe.Pointer(&call))); errno != 0 {
			continue // the thread was interrupted
		}
		answer := seccompResponse{id: call.id, flags: continueTheCall}
		var err error
		if call.nr == archPrctl {
			// Go's first system call, before it looks for the vDSO.
			err = hideVDSO(int(call.pid))
		} else {
			answer.flags = 0
			err = writeTime(int(call.pid), call.args[1], time.Now().Add(time.Duration(c.shift.Load())))
		}
		if err != nil {
			answer.flags, answer.error = 0, -int32(unix.EFAULT)
		}
		_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(listener), ioctlSend, uintptr(unsafe.Pointer(&answer)))
	}
}

func writeTime(pid int, at uint64, now time.Time) error {
	value := unix.NsecToTimespec(now.UnixNano())
	raw := binary.NativeEndian.AppendUint64(nil, uint64(value.Sec))
	raw = binary.NativeEndian.AppendUint64(raw, uint64(value.Nsec))
	return writeMemory(pid, at, raw)
}

func writeMemory(pid int, at uint64, data []byte) error {
	local := []unix.Iovec{{Base: &data[0], Len: uint64(len(data))}}
	_, err := unix.ProcessVMWritev(pid, local, []unix.RemoteIovec{{Base: uintptr(at), Len: len(data)}}, 0)
	return err
}

// hideVDSO removes the vDSO from the auxiliary vector on the program's stack. Without
// the vDSO, the program asks the kernel for the time.
func hideVDSO(pid int) error {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return err
	}
	// The second field is the name, in parentheses.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	at, err := strconv.ParseUint(fields[startStack-3], 10, 64)
	if err != nil {
		return err
	}
	stack := make([]byte, largestArguments)
	local := []unix.Iovec{{Base: &stack[0], Len: uint64(len(stack))}}
	// The stack may end earlier.
	n, err := unix.ProcessVMReadv(pid, local, pages(uintptr(at), len(stack)), 0)
	if err != nil {
		return err
	}
	word := func(i int) uint64 {
		if 8*i+8 > n {
			return 0
		}
		return binary.NativeEndian.Uint64(stack[8*i:])
	}
	i := 1 + int(word(0)) + 1 // the count, the arguments, and a zero
	for word(i) != 0 {
		i++ // the environment
	}
	for i++; word(i) != 0; i += 2 {
		if word(i) == auxSysinfoEHDR {
			return writeMemory(pid, at+uint64(8*i), binary.NativeEndian.AppendUint64(nil, auxIgnore))
		}
	}
	return errors.New("the program has no vDSO")
}

// pages divides a range of memory at the limits of its pages. A read of several ranges
// ends at the first one that is not mapped.
func pages(at uintptr, size int) (list []unix.RemoteIovec) {
	for page := uintptr(os.Getpagesize()); size > 0; {
		n := min(size, int(page-at%page))
		list = append(list, unix.RemoteIovec{Base: at, Len: n})
		at, size = at+uintptr(n), size-n
	}
	return list
}
