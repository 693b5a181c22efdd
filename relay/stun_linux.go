package relay

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"tailscale.com/net/stun"
)

const (
	// stunBatch is how many requests one system call receives at most.
	stunBatch = 64

	// stunControl has room for both control messages of a request over IPv4
	// on a socket for IPv6, in bytes; a multiple of their alignment.
	stunControl = 128

	// stunSendTimeout is how long replies wait for a device that does not
	// send. The requests behind them wait as well, so it is short.
	stunSendTimeout = 200 * time.Millisecond
)

// serveBatches answers requests until ctx ends. One system call receives all
// requests that wait, and one sends all replies. Between them the thread sleeps
// in the first one, not in Go's poller: that would cost two more calls for each
// time it wakes.
func (s *STUN) serveBatches(ctx context.Context) error {
	fd, err := s.blockingSocket()
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		// It fails, since the socket is not connected, and yet wakes the thread.
		_ = unix.Shutdown(fd, unix.SHUT_RD)
	})
	// By the time the descriptor is closed, nobody may be using it: its number
	// could be another file's already.
	defer func() {
		if !stop() {
			<-done
		}
	}()

	b := newBatch()
	for ctx.Err() == nil {
		n, err := b.receive(fd)
		if err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			// An ICMP error of an earlier reply; the socket is fine.
			s.log.Debug().Err(err).Msg("stun read failed")
			if !pause(ctx, readPause) {
				break
			}
			continue
		}
		replies := s.answer(b, n)
		for sent := 0; sent < replies; {
			n, err := b.send(fd, sent, replies)
			switch {
			case errors.Is(err, unix.EINTR):
			case err != nil:
				s.log.Debug().Err(err).Msg("stun reply failed")
				sent++ // that one is lost, the others are not
			default:
				sent += n
			}
		}
	}
	return nil
}

// blockingSocket is the same socket under a descriptor of its own, out of the
// hands of Go's poller. The error is [errors.ErrUnsupported] where the kernel,
// or a filter of system calls, knows no batches.
func (s *STUN) blockingSocket() (int, error) {
	raw, err := s.conn.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	control := func(c uintptr) {
		if fd, err = unix.FcntlInt(c, unix.F_DUPFD_CLOEXEC, 0); err != nil {
			err = os.NewSyscallError("fcntl", err)
			return
		}
		for _, call := range []uintptr{unix.SYS_RECVMMSG, unix.SYS_SENDMMSG} {
			if _, _, errno := unix.Syscall6(call, uintptr(fd), 0, 0, 0, 0, 0); errno == unix.ENOSYS || errno == unix.EPERM {
				err = errors.ErrUnsupported
				return
			}
		}
		timeout := unix.NsecToTimeval(stunSendTimeout.Nanoseconds())
		if err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout); err != nil {
			err = os.NewSyscallError("setsockopt", err)
			return
		}
		err = os.NewSyscallError("fcntl", unix.SetNonblock(fd, false))
	}
	if controlErr := raw.Control(control); controlErr != nil {
		err = controlErr
	}
	if err != nil && fd >= 0 {
		_ = unix.Close(fd)
	}
	return fd, err
}

// batch is the memory of requests and their replies. It is made once; each
// reply uses its request's address and control message where they lie.
type batch struct {
	in, out  [stunBatch]unix.Mmsghdr
	requests [stunBatch]request
	replies  [stunBatch]reply
	dirty    int // how many of in the kernel has changed
}

type request struct {
	iov     unix.Iovec
	name    unix.RawSockaddrInet6   // the kernel writes the one of IPv4 too
	control [stunControl / 8]uint64 // in units that align it
	packet  [maxSTUNPacket]byte
}

type reply struct {
	iov    unix.Iovec
	packet [maxSTUNResponse]byte
}

func newBatch() *batch {
	b := &batch{dirty: stunBatch}
	for i := range b.in {
		r := &b.requests[i]
		r.iov.Base = &r.packet[0]
		r.iov.SetLen(len(r.packet))
		h := &b.in[i].Hdr
		h.Name = (*byte)(unsafe.Pointer(&r.name))
		h.Iov = &r.iov
		h.SetIovlen(1)
		h.Control = (*byte)(unsafe.Pointer(&r.control))

		b.replies[i].iov.Base = &b.replies[i].packet[0]
		b.out[i].Hdr.Iov = &b.replies[i].iov
		b.out[i].Hdr.SetIovlen(1)
	}
	return b
}

// receive waits for a request, and takes all that are there by then.
func (b *batch) receive(fd int) (int, error) {
	for i := range b.in[:b.dirty] {
		h := &b.in[i].Hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(stunControl)
	}
	b.dirty = stunBatch
	n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.in)), stunBatch, unix.MSG_WAITFORONE, 0, 0)
	if errno != 0 {
		return 0, os.NewSyscallError("recvmmsg", errno)
	}
	b.dirty = int(n)
	return int(n), nil
}

// send sends the replies from..to, and returns how many it could.
func (b *batch) send(fd, from, to int) (int, error) {
	n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.out[from])), uintptr(to-from), 0, 0, 0)
	if errno != 0 {
		return 0, os.NewSyscallError("sendmmsg", errno)
	}
	return int(n), nil
}

// answer makes the replies to the first n requests, and returns how many there
// are. It allocates nothing.
func (s *STUN) answer(b *batch, n int) int {
	if !s.open.Load() {
		return 0
	}
	replies := 0
	for i := range n {
		in, r := &b.in[i], &b.requests[i]
		packet := r.packet[:in.Len]
		if !plausible(packet) {
			continue
		}
		tx, err := stun.ParseBindingRequest(packet)
		if err != nil {
			continue
		}
		from := r.from()
		if !from.IsValid() || s.gateways.refuse(from.Addr()) {
			continue
		}
		out := &b.out[replies].Hdr
		b.replies[replies].iov.SetLen(putResponse(&b.replies[replies].packet, tx, from))
		out.Name, out.Namelen = in.Hdr.Name, in.Hdr.Namelen
		out.Control = nil
		out.SetControllen(0)
		if control := r.source(int(in.Hdr.Controllen)); control != nil {
			out.Control = &control[0]
			out.SetControllen(len(control))
		}
		replies++
	}
	return replies
}

// from is the client's address; not valid when it is of another kind.
func (r *request) from() netip.AddrPort {
	// The port is in network byte order, whatever the type says.
	port := (*[2]byte)(unsafe.Pointer(&r.name.Port))
	number := uint16(port[0])<<8 | uint16(port[1])
	switch r.name.Family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(&r.name)).Addr), number)
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16(r.name.Addr).Unmap(), number)
	}
	return netip.AddrPort{}
}

// source turns what the kernel told of the request's destination into what
// makes the reply leave from there, in the same place. It is nil when there is
// no such address. length is that of all control messages, in bytes.
func (r *request) source(length int) []byte {
	all := (*[stunControl]byte)(unsafe.Pointer(&r.control))[:]
	var found []byte
	for at := 0; at+unix.CmsgLen(0) <= length; {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&all[at]))
		size := int(h.Len)
		if size < unix.CmsgLen(0) || at+size > length {
			break
		}
		data := all[at+unix.CmsgLen(0) : at+size]
		switch {
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			// Its ipi_spec_dst is an address of this host even when the
			// request was a broadcast, so it goes before the other one,
			// which a socket for IPv6 has in addition.
			info := (*unix.Inet4Pktinfo)(unsafe.Pointer(&data[0]))
			info.Ifindex = 0 // the way back may be another
			return all[at : at+size]
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			info := (*unix.Inet6Pktinfo)(unsafe.Pointer(&data[0]))
			info.Ifindex = 0
			if addr := netip.AddrFrom16(info.Addr).Unmap(); !addr.IsMulticast() && !addr.IsUnspecified() {
				found = all[at : at+size]
			}
		}
		at += unix.CmsgSpace(size - unix.CmsgLen(0))
	}
	return found
}

// receiveBuffer is how much the socket really keeps, in bytes of the kernel's
// own counting; 0 when it does not tell.
func (s *STUN) receiveBuffer() int {
	raw, err := s.conn.SyscallConn()
	if err != nil {
		return 0
	}
	size := 0
	if err := raw.Control(func(fd uintptr) { size, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF) }); err != nil {
		return 0
	}
	return size
}
