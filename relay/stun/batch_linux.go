package stun

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	batchSize   = 64  // requests that one system call receives at most
	sendTimeout = 200 // milliseconds that replies wait for room to send; further requests wait meanwhile
)

// batch answers all waiting requests by two system calls: recvmmsg receives the
// requests, and sendmmsg sends the replies.
type batch struct {
	server   *Server
	raw      syscall.RawConn
	requests [batchSize]request
	in, out  [batchSize]unix.Mmsghdr
}

type request struct {
	packet, reply unix.Iovec
	control       [controlSize]byte // aligned, because it follows an Iovec
	name          [unix.SizeofSockaddrInet6]byte
	data          [packetSize]byte
}

// useBatches sets serve to that of a batch. It reports false if the kernel or a
// seccomp filter refuses the system calls.
func (s *Server) useBatches() (supported bool) {
	raw, err := s.conn.SyscallConn()
	if err != nil {
		return false
	}
	err = raw.Control(func(fd uintptr) {
		_, receiveErr := transfer(unix.SYS_RECVMMSG, fd, nil)
		_, sendErr := transfer(unix.SYS_SENDMMSG, fd, nil)
		supported = receiveErr == nil && sendErr == nil
	})
	s.serve = newBatch(s, raw).serve
	return supported && err == nil
}

func newBatch(s *Server, raw syscall.RawConn) *batch {
	b := &batch{server: s, raw: raw}
	for i := range b.in {
		r, in := &b.requests[i], &b.in[i].Hdr
		r.packet.Base, in.Iov, in.Name, in.Control = &r.data[0], &r.packet, &r.name[0], &r.control[0]
		r.packet.SetLen(packetSize)
		in.SetIovlen(1)
		in.Namelen = unix.SizeofSockaddrInet6
		in.SetControllen(controlSize)
	}
	return b
}

// serve answers requests until a read fails. The function that it passes to Read
// returns false to wait in the poller. The poller wakes for every packet, so a
// single packet is not followed by another read. This saves a system call per
// request.
func (b *batch) serve(ctx context.Context) (failed error) {
	err := b.raw.Read(func(fd uintptr) bool {
		for n := 0; n != 1 && ctx.Err() == nil; {
			if n, failed = transfer(unix.SYS_RECVMMSG, fd, b.in[:]); failed != nil {
				return !errors.Is(failed, unix.EAGAIN)
			}
			b.server.failures.Succeeded()
			b.send(fd, b.answer(n))
		}
		return false
	})
	return cmp.Or(err, failed)
}

// answer returns the replies to the first n requests.
func (b *batch) answer(n int) []unix.Mmsghdr {
	replies := b.out[:0]
	for i := range n {
		r, in := &b.requests[i], &b.in[i]
		if reply, source := b.server.reply(r.data[:in.Len], r.control[:in.Hdr.Controllen], sender(&r.name)); reply != nil {
			r.reply.Base = &reply[0]
			r.reply.SetLen(len(reply))
			out := in.Hdr // keeps the name, which is the client's address
			out.Iov = &r.reply
			out.SetControllen(len(source))
			replies = append(replies, unix.Mmsghdr{Hdr: out})
		}
		in.Hdr.Namelen = unix.SizeofSockaddrInet6 // as the kernel found it
		in.Hdr.SetControllen(controlSize)
	}
	return replies
}

// send sends replies. A reply that fails is lost, and the next replies are sent. All
// replies are lost if the send buffer stays full.
func (b *batch) send(fd uintptr, replies []unix.Mmsghdr) {
	for len(replies) > 0 {
		n, err := transfer(unix.SYS_SENDMMSG, fd, replies)
		if errors.Is(err, unix.EAGAIN) {
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, sendTimeout)
			n, err = transfer(unix.SYS_SENDMMSG, fd, replies)
		}
		if errors.Is(err, unix.EAGAIN) {
			n = len(replies)
		} else if err != nil {
			n = 1
		}
		b.server.sent(n, err)
		replies = replies[n:]
	}
}

// transfer calls recvmmsg or sendmmsg, which return at once. RawSyscall6 hides the
// call from Go's scheduler, which would wake its monitor thread after idle times.
func transfer(call, fd uintptr, messages []unix.Mmsghdr) (int, error) {
	n, _, errno := unix.RawSyscall6(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(messages))), uintptr(len(messages)), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// sender returns the address in a sockaddr_in or a sockaddr_in6.
func sender(name *[unix.SizeofSockaddrInet6]byte) netip.AddrPort {
	addr := netip.AddrFrom16([16]byte(name[8:24]))
	if binary.NativeEndian.Uint16(name[:]) == unix.AF_INET {
		addr = netip.AddrFrom4([4]byte(name[4:8]))
	}
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(name[2:]))
}
