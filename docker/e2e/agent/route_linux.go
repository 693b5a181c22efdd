package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// addRoute adds a route to an address through a neighbour, `route ADDRESS HOST`, as
// `ip route add` does (rtnetlink(7)).
func addRoute(ctx context.Context, args []string) (any, error) {
	to, err := netip.ParseAddr(args[0])
	if err != nil {
		return nil, err
	}
	found, err := net.DefaultResolver.LookupNetIP(ctx, "ip4", args[1])
	if err != nil {
		return nil, err
	}
	gateway := found[0].Unmap()
	if !to.Is4() || !gateway.Is4() {
		return nil, errors.New("address or gateway is not IPv4; use IPv4")
	}
	message := slices.Concat(
		native(unix.RtMsg{
			Family: unix.AF_INET, Dst_len: 32, Table: unix.RT_TABLE_MAIN,
			Protocol: unix.RTPROT_STATIC, Scope: unix.RT_SCOPE_UNIVERSE, Type: unix.RTN_UNICAST,
		}),
		attribute(unix.RTA_DST, to), attribute(unix.RTA_GATEWAY, gateway),
	)
	header := native(unix.NlMsghdr{
		Len: uint32(unix.SizeofNlMsghdr + len(message)), Type: unix.RTM_NEWROUTE,
		Flags: unix.NLM_F_REQUEST | unix.NLM_F_ACK | unix.NLM_F_CREATE, Seq: 1,
	})

	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Sendto(fd, slices.Concat(header, message), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, os.NewSyscallError("sendto", err)
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return nil, os.NewSyscallError("recvfrom", err)
	}
	// The acknowledgement is an error message, in which 0 means success.
	var code int32
	if err := binary.Read(bytes.NewReader(answer[unix.SizeofNlMsghdr:n]), binary.NativeEndian, &code); err != nil {
		return nil, err
	}
	if code != 0 {
		return nil, fmt.Errorf("adding a route to %s through %s: %w", to, gateway, unix.Errno(-code))
	}
	return nil, nil
}

// native returns a struct without padding in the layout of the kernel.
func native(v any) []byte {
	var b bytes.Buffer
	_ = binary.Write(&b, binary.NativeEndian, v) // cannot fail: all fields have a fixed size
	return b.Bytes()
}

func attribute(kind uint16, addr netip.Addr) []byte {
	return slices.Concat(native(unix.RtAttr{Len: unix.SizeofRtAttr + 4, Type: kind}), addr.AsSlice())
}
