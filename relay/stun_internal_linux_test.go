package relay

import (
	"bytes"
	"net/netip"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	"tailscale.com/net/pktinfo"
	"tailscale.com/net/stun"
)

// put makes the i-th request of a batch, as the kernel would.
func (b *batch) put(i int, packet []byte, from netip.AddrPort, control []byte) {
	r, in := &b.requests[i], &b.in[i]
	in.Len = uint32(copy(r.packet[:], packet))
	port := (*[2]byte)(unsafe.Pointer(&r.name.Port))
	port[0], port[1] = byte(from.Port()>>8), byte(from.Port())
	r.name.Family = unix.AF_INET6
	r.name.Addr = from.Addr().As16()
	in.Hdr.Namelen = unix.SizeofSockaddrInet6
	if from.Addr().Is4() {
		name := (*unix.RawSockaddrInet4)(unsafe.Pointer(&r.name))
		name.Family, name.Addr = unix.AF_INET, from.Addr().As4()
		in.Hdr.Namelen = unix.SizeofSockaddrInet4
	}
	all := (*[stunControl]byte)(unsafe.Pointer(&r.control))
	in.Hdr.SetControllen(copy(all[:], control))
}

// reply is the i-th reply and its control message.
func (b *batch) reply(i int) (packet, control []byte) {
	h := &b.out[i].Hdr
	packet = b.replies[i].packet[:b.replies[i].iov.Len]
	if h.Control != nil {
		control = unsafe.Slice(h.Control, int(h.Controllen))
	}
	return packet, control
}

func openSTUN(gateways ...netip.Addr) *STUN {
	s := &STUN{}
	s.gateways.addrs = gateways
	s.SetOpen(true)
	return s
}

// FuzzSTUN gives the server a batch with a stranger's packet in it: it is
// answered if and only if upstream's parser accepts it, with upstream's answer,
// and so are the requests around it.
func FuzzSTUN(f *testing.F) {
	for _, seed := range stunSeeds() {
		f.Add(seed, []byte{})
		f.Add(seed, pktinfo.AppendSrc(nil, netip.MustParseAddr("2001:db8::9")))
	}
	b, s := newBatch(), openSTUN()
	from := [3]netip.AddrPort{
		netip.MustParseAddrPort("192.0.2.1:1024"), netip.MustParseAddrPort("[2001:db8::1]:65535"), netip.MustParseAddrPort("[::ffff:192.0.2.3]:1"),
	}
	f.Fuzz(func(t *testing.T, packet, control []byte) {
		if len(packet) > maxSTUNPacket {
			packet = packet[:maxSTUNPacket]
		}
		packets := [3][]byte{stun.Request(stun.TxID{1}), packet, stun.Request(stun.TxID{3})}
		var want [][]byte
		for i, p := range packets {
			b.put(i, p, from[i], control)
			if tx, err := stun.ParseBindingRequest(p); err == nil {
				want = append(want, stun.Response(tx, netip.AddrPortFrom(from[i].Addr().Unmap(), from[i].Port())))
			}
		}
		if n := s.answer(b, len(packets)); n != len(want) {
			t.Fatalf("%d answers, want %d", n, len(want))
		}
		for i := range want {
			if got, _ := b.reply(i); !bytes.Equal(got, want[i]) {
				t.Errorf("answer %d is %x, want %x", i, got, want[i])
			}
		}
	})
}

// The reply's source is upstream's choice from the same control messages.
func TestSTUNReplySource(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")
	timestamp := make([]byte, unix.CmsgSpace(1)) // of no interest, and padded
	h := (*unix.Cmsghdr)(unsafe.Pointer(&timestamp[0]))
	h.SetLen(unix.CmsgLen(1))
	h.Level, h.Type = unix.SOL_SOCKET, unix.SO_TIMESTAMP
	info4 := unix.PktInfo4(&unix.Inet4Pktinfo{Ifindex: 3, Spec_dst: v4.As4(), Addr: [4]byte{192, 0, 2, 255}})
	info6 := unix.PktInfo6(&unix.Inet6Pktinfo{Addr: v6.As16(), Ifindex: 3})
	mapped := unix.PktInfo6(&unix.Inet6Pktinfo{Addr: netip.AddrFrom16(v4.As16()).As16(), Ifindex: 3})
	multicast := unix.PktInfo6(&unix.Inet6Pktinfo{Addr: netip.MustParseAddr("ff02::1").As16(), Ifindex: 3})
	broken := bytes.Clone(info4)
	(*unix.Cmsghdr)(unsafe.Pointer(&broken[0])).SetLen(4000)

	b, s := newBatch(), openSTUN()
	for name, tt := range map[string]struct {
		control []byte
		want    netip.Addr
	}{
		"none":               {nil, netip.Addr{}},
		"IPv4":               {info4, v4},
		"IPv6":               {info6, v6},
		"both":               {append(bytes.Clone(mapped), info4...), v4},
		"both, turned round": {append(bytes.Clone(info4), mapped...), v4},
		"behind another":     {append(bytes.Clone(timestamp), info6...), v6},
		"multicast":          {multicast, netip.Addr{}},
		"broken":             {broken, netip.Addr{}},
		"cut off":            {info4[:unix.CmsgLen(2)], netip.Addr{}},
	} {
		b.put(0, stun.Request(stun.TxID{1}), netip.MustParseAddrPort("192.0.2.1:1"), tt.control)
		if n := s.answer(b, 1); n != 1 {
			t.Fatalf("%s: %d answers", name, n)
		}
		_, control := b.reply(0)
		if got := pktinfo.Dst(control); got != tt.want {
			t.Errorf("%s: the reply leaves from %s, want %s", name, got, tt.want)
		}
		// Padding apart, and with no interface in it.
		if want := pktinfo.AppendSrc(nil, tt.want); len(control) > len(want) || len(control) < len(want)-7 || !bytes.Equal(withoutAddr(control), withoutAddr(want[:len(control)])) {
			t.Errorf("%s: control message % x, want % x", name, control, want)
		}
	}
}

// withoutAddr blanks ipi_addr, which sending ignores.
func withoutAddr(control []byte) []byte {
	out := bytes.Clone(control)
	if len(out) == unix.CmsgLen(unix.SizeofInet4Pktinfo) {
		clear(out[len(out)-4:])
	}
	return out
}

func TestSTUNAllocatesNothing(t *testing.T) {
	b, s := newBatch(), openSTUN(netip.MustParseAddr("172.17.0.1"), netip.MustParseAddr("fd00::1"))
	control := pktinfo.AppendSrc(nil, netip.MustParseAddr("2001:db8::7"))
	seeds := stunSeeds()
	answers := 0
	allocs := testing.AllocsPerRun(100, func() {
		for i := range stunBatch {
			from := netip.MustParseAddrPort("[2001:db8::1]:1024")
			if i%2 == 0 {
				from = netip.MustParseAddrPort("192.0.2.1:1024")
			}
			b.put(i, seeds[i%len(seeds)], from, control)
		}
		answers = s.answer(b, stunBatch)
	})
	if allocs != 0 || answers == 0 {
		t.Errorf("%v allocations for a batch with %d answers", allocs, answers)
	}
}

// An invalid packet must not cost more than a valid one.
func BenchmarkSTUNPacket(b *testing.B) {
	seeds := stunSeeds()
	for name, packet := range map[string][]byte{"valid": seeds[0], "fingerprint": seeds[1], "other software": seeds[2], "noise": seeds[len(seeds)-1]} {
		b.Run(name, func(b *testing.B) {
			s, memory := openSTUN(), newBatch()
			memory.put(0, packet, netip.MustParseAddrPort("192.0.2.1:1024"), pktinfo.AppendSrc(nil, netip.MustParseAddr("192.0.2.7")))
			b.ReportAllocs()
			for b.Loop() {
				s.answer(memory, 1)
			}
		})
	}
}
