package relay

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"syscall"
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
// requests that wait, and one sends all replies.
func (s *STUN) serveBatches(ctx context.Context) error {
	raw, err := s.conn.SyscallConn()
	if err != nil {
		return err
	}
	if err := batchesSupported(raw); err != nil {
		return err
	}
	b := newBatch()
	for {
		var failed error
		err := raw.Read(func(fd uintptr) bool {
			failed = s.serveWaiting(ctx, raw, fd, b)
			return failed != nil
		})
		if err != nil {
			return err // closed
		}
		// An ICMP error of an earlier reply; the socket is fine.
		s.log.Debug().Err(failed).Msg("stun read failed")
		if !pause(ctx, readPause) {
			return nil
		}
	}
}

// serveWaiting answers what waits. It returns nil for Go's poller to say when
// there is more. That is called for each datagram that arrives, so one that is
// alone need not be followed by a look whether another one is there: this way a
// request costs a system call less than with reads of Go's own.
func (s *STUN) serveWaiting(ctx context.Context, raw syscall.RawConn, fd uintptr, b *batch) error {
	for ctx.Err() == nil {
		n, errno := b.receive(fd)
		switch errno {
		case 0:
		case unix.EAGAIN:
			return nil
		case unix.EINTR:
			continue
		default:
			return os.NewSyscallError("recvmmsg", errno)
		}
		s.send(raw, fd, b, s.answer(b, n))
		if n == 1 {
			return nil
		}
	}
	return nil
}

// send sends the first n messages. One that cannot be sent is lost, the others
// are not.
func (s *STUN) send(raw syscall.RawConn, fd uintptr, b *batch, n int) {
	for sent := 0; sent < n; {
		done, errno := b.send(fd, sent, n)
		if errno == unix.EAGAIN {
			var err error
			if done, errno, err = s.sendWhenThereIsRoom(raw, b, sent, n); err != nil {
				s.log.Debug().Err(err).Msg("stun reply failed")
				return
			}
		}
		switch errno {
		case 0:
			sent += done
		case unix.EINTR:
		default:
			// Such a message is lost once; clients ask again.
			b.whole = b.whole || b.out[sent].Hdr.Iovlen > 1
			s.log.Debug().Err(os.NewSyscallError("sendmmsg", errno)).Msg("stun reply failed")
			sent++
		}
	}
}

// sendWhenThereIsRoom is [batch.send], but waits while a device does not send.
func (s *STUN) sendWhenThereIsRoom(raw syscall.RawConn, b *batch, from, to int) (done int, errno syscall.Errno, err error) {
	if err := s.conn.SetWriteDeadline(time.Now().Add(stunSendTimeout)); err != nil {
		return 0, 0, err
	}
	err = raw.Write(func(fd uintptr) bool {
		done, errno = b.send(fd, from, to)
		return errno != unix.EAGAIN
	})
	return done, errno, err
}

// batchesSupported is [errors.ErrUnsupported] where the kernel, or a filter of
// system calls, knows no batches.
func batchesSupported(raw syscall.RawConn) (err error) {
	controlErr := raw.Control(func(fd uintptr) {
		for _, call := range []uintptr{unix.SYS_RECVMMSG, unix.SYS_SENDMMSG} {
			if _, _, errno := unix.Syscall6(call, fd, 0, 0, unix.MSG_DONTWAIT, 0, 0); errno == unix.ENOSYS || errno == unix.EPERM {
				err = errors.ErrUnsupported
			}
		}
	})
	return cmp.Or(controlErr, err)
}

// batch is the memory of requests and their replies. It is made once; each
// message of replies uses its request's address and control messages where they
// lie.
type batch struct {
	in       [stunBatch]unix.Mmsghdr
	requests [stunBatch]request
	dirty    int // how many of in the kernel has changed

	out     [stunBatch]unix.Mmsghdr
	vectors [stunBatch]unix.Iovec // of out: a message has one for each reply
	replies [stunBatch][maxSTUNResponse]byte

	// whole is set where the kernel, or a device, cannot cut a message into
	// replies.
	whole bool
}

type request struct {
	iov     unix.Iovec
	name    unix.RawSockaddrInet6   // the kernel writes the one of IPv4 too
	control [stunControl / 8]uint64 // in units that align it
	packet  [maxSTUNPacket]byte
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

		b.vectors[i].Base = &b.replies[i][0]
	}
	return b
}

// receive takes all requests that are there. Neither this nor send is a call
// that the scheduler is told of, for the reason that [Sockets] has.
func (b *batch) receive(fd uintptr) (int, syscall.Errno) {
	for i := range b.in[:b.dirty] {
		h := &b.in[i].Hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(stunControl)
	}
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&b.in)), stunBatch, unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		n = 0
	}
	b.dirty = int(n)
	return int(n), errno
}

// send sends the messages from..to, and returns how many it could.
func (b *batch) send(fd uintptr, from, to int) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&b.out[from])), uintptr(to-from), unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno
}

// answer makes the replies to the first n requests, and returns how many
// messages they are. It allocates nothing.
//
// Replies to requests that came from one socket to one address, one right after
// the other, are one message, which the kernel cuts (UDP_SEGMENT in udp(7)): a
// flood costs the less the faster it comes.
func (s *STUN) answer(b *batch, n int) int {
	if !s.open.Load() {
		return 0
	}
	var last struct { // message
		request *request // the first
		from    netip.AddrPort
		control []byte
		replies int
	}
	messages, replies := 0, 0
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
		size := putResponse(&b.replies[replies], tx, from)
		b.vectors[replies].SetLen(size)
		control := r.source(int(in.Hdr.Controllen))
		same := !b.whole && last.replies > 0 && from == last.from && bytes.Equal(control, last.control)
		if same && last.replies == 1 {
			segmented := last.request.segmented(last.control, size)
			if same = segmented != nil; same {
				setControl(&b.out[messages-1].Hdr, segmented)
			}
		}
		if same {
			last.replies++
			b.out[messages-1].Hdr.SetIovlen(last.replies)
		} else {
			out := &b.out[messages].Hdr
			out.Name, out.Namelen = in.Hdr.Name, in.Hdr.Namelen
			out.Iov = &b.vectors[replies]
			out.SetIovlen(1)
			setControl(out, control)
			last.request, last.from, last.control, last.replies = r, from, control, 1
			messages++
		}
		replies++
	}
	return messages
}

func setControl(h *unix.Msghdr, control []byte) {
	h.Control = unsafe.SliceData(control)
	h.SetControllen(len(control))
}

// segmented is control, the message that r has from source or nothing, and after
// it the one by which the kernel cuts what is sent into packets of this size. It
// is nil if there is no room for that.
func (r *request) segmented(control []byte, size int) []byte {
	all := (*[stunControl]byte)(unsafe.Pointer(&r.control))[:]
	begin, end := 0, 0
	if control != nil {
		begin = len(all) - cap(control)
		end = begin + unix.CmsgSpace(len(control)-unix.CmsgLen(0))
	}
	if end+unix.CmsgSpace(2) > len(all) {
		return nil
	}
	h := (*unix.Cmsghdr)(unsafe.Pointer(&all[end]))
	h.Level, h.Type = unix.IPPROTO_UDP, unix.UDP_SEGMENT
	h.SetLen(unix.CmsgLen(2))
	binary.NativeEndian.PutUint16(all[end+unix.CmsgLen(0):], uint16(size))
	return all[begin : end+unix.CmsgSpace(2)]
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
