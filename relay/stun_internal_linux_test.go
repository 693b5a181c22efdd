package relay

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
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

// reply is the i-th message of replies and its control message.
func (b *batch) reply(i int) (packets [][]byte, control []byte) {
	h := &b.out[i].Hdr
	for _, v := range unsafe.Slice(h.Iov, int(h.Iovlen)) {
		packets = append(packets, unsafe.Slice(v.Base, int(v.Len)))
	}
	if h.Control != nil {
		control = unsafe.Slice(h.Control, int(h.Controllen))
	}
	return packets, control
}

func openSTUN(gateways ...netip.Addr) *STUN {
	s := &STUN{}
	s.gateways.addrs = gateways
	s.SetOpen(true)
	return s
}

// FuzzSTUN gives the server a batch with a stranger's packet in it: it is
// answered if and only if upstream's parser accepts it, with upstream's answer,
// and so are the requests around it, whose answers are together if it is not.
func FuzzSTUN(f *testing.F) {
	for _, seed := range stunSeeds() {
		f.Add(seed, []byte{})
		f.Add(seed, pktinfo.AppendSrc(nil, netip.MustParseAddr("2001:db8::9")))
	}
	b, s := newBatch(), openSTUN()
	from := [3]netip.AddrPort{
		netip.MustParseAddrPort("192.0.2.3:1"), netip.MustParseAddrPort("[2001:db8::1]:65535"), netip.MustParseAddrPort("[::ffff:192.0.2.3]:1"),
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
		var got [][]byte
		for i := range s.answer(b, len(packets)) {
			replies, control := b.reply(i)
			if segment := segmentOf(control); len(replies) > 1 && segment != len(replies[0]) {
				t.Errorf("%d replies of %d bytes are cut by %d", len(replies), len(replies[0]), segment)
			}
			got = append(got, replies...)
		}
		if !slices.EqualFunc(got, want, bytes.Equal) {
			t.Errorf("answers %x, want %x", got, want)
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

// Replies to one socket are one message, in the order of the requests; one to
// another socket, or from another address, is not among them.
func TestSTUNJoinsReplies(t *testing.T) {
	a, b := netip.MustParseAddrPort("192.0.2.1:1024"), netip.MustParseAddrPort("[2001:db8::1]:1024")
	info := func(asked string) []byte { return pktinfo.AppendSrc(nil, netip.MustParseAddr(asked)) }
	timestamps := bytes.Repeat(cmsg(unix.SOL_SOCKET, unix.SO_TIMESTAMP, make([]byte, 16)), 3)
	type asked struct {
		from    netip.AddrPort
		control []byte
	}
	plain, other, v6 := info("192.0.2.7"), info("192.0.2.8"), info("2001:db8::7")
	far := append(bytes.Clone(timestamps), plain...) // no room for another one behind it
	for _, tt := range []struct {
		name  string
		asked []asked
		whole bool
		want  []int // replies of each message
	}{
		{"one socket", []asked{{a, plain}, {a, plain}, {a, plain}}, false, []int{3}},
		{"one over IPv6", []asked{{b, v6}, {b, v6}}, false, []int{2}},
		{"no address", []asked{{a, nil}, {a, nil}}, false, []int{2}},
		{"two sockets", []asked{{a, plain}, {a, plain}, {b, v6}, {a, plain}}, false, []int{2, 1, 1}},
		{"two addresses", []asked{{a, plain}, {a, other}, {a, other}}, false, []int{1, 2}},
		{"no room", []asked{{a, far}, {a, far}}, false, []int{1, 1}},
		{"not possible", []asked{{a, plain}, {a, plain}}, true, []int{1, 1}},
	} {
		memory, s := newBatch(), openSTUN()
		memory.whole = tt.whole
		var want [][]byte
		for i, q := range tt.asked {
			tx := stun.TxID{byte(i)}
			memory.put(i, stun.Request(tx), q.from, q.control)
			want = append(want, stun.Response(tx, q.from))
		}
		var sizes []int
		var got [][]byte
		for i := range s.answer(memory, len(tt.asked)) {
			packets, control := memory.reply(i)
			sizes = append(sizes, len(packets))
			got = append(got, packets...)
			if segment := segmentOf(control); len(packets) > 1 && segment != len(packets[0]) || len(packets) == 1 && segment != 0 {
				t.Errorf("%s: %d replies of %d bytes are cut by %d", tt.name, len(packets), len(packets[0]), segment)
			}
			if from := pktinfo.Dst(control); from != pktinfo.Dst(tt.asked[len(got)-1].control) {
				t.Errorf("%s: message %d leaves from %s", tt.name, i, from)
			}
		}
		if !slices.Equal(sizes, tt.want) || !slices.EqualFunc(got, want, bytes.Equal) {
			t.Errorf("%s: messages of %d replies, want %d, or other replies: %x", tt.name, sizes, tt.want, got)
		}
	}
}

// cmsg is a control message, padded.
func cmsg(level, kind int, data []byte) []byte {
	b := make([]byte, unix.CmsgSpace(len(data)))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.SetLen(unix.CmsgLen(len(data)))
	h.Level, h.Type = int32(level), int32(kind)
	copy(b[unix.CmsgLen(0):], data)
	return b
}

// segmentOf is the size by which a message is cut, 0 if it is not.
func segmentOf(control []byte) int {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return 0
	}
	for _, m := range messages {
		if m.Header.Level == unix.IPPROTO_UDP && m.Header.Type == unix.UDP_SEGMENT {
			return int(binary.NativeEndian.Uint16(m.Data))
		}
	}
	return 0
}

func TestSTUNAllocatesNothing(t *testing.T) {
	b, s := newBatch(), openSTUN(netip.MustParseAddr("172.17.0.1"), netip.MustParseAddr("fd00::1"))
	control := pktinfo.AppendSrc(nil, netip.MustParseAddr("2001:db8::7"))
	seeds := stunSeeds()
	answers := 0
	allocs := testing.AllocsPerRun(100, func() {
		for i := range stunBatch {
			from := netip.MustParseAddrPort("[2001:db8::1]:1024")
			if i%4 < 2 {
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
