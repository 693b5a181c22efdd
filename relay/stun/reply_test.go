package stun

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"net/netip"
	"strings"
	"testing"

	"github.com/rs/zerolog"
	"tailscale.com/net/pktinfo"
	upstream "tailscale.com/net/stun"

	"derpd/internal/caught"
)

// fingerprinted corrects the fingerprint of a request.
func fingerprinted(request []byte) []byte {
	sum := len(request) - 4
	binary.BigEndian.PutUint32(request[sum:], crc32.ChecksumIEEE(request[:sum-4])^0x5354554e)
	return request
}

// FuzzSTUN gives the server any packet. It gets upstream's answer if and only if
// upstream's parser accepts it, from the address that upstream finds.
func FuzzSTUN(f *testing.F) {
	info := pktinfo.AppendSrc(nil, netip.MustParseAddr("2001:db8::9"))
	f.Add(upstream.Request(upstream.TxID{1, 2, 3}), []byte{})
	f.Add(longRequest(200), pktinfo.AppendSrc(nil, netip.MustParseAddr("192.0.2.9")))
	for _, packet := range notRequests() {
		f.Add(packet, info)
	}
	var s Server
	s.counters.init()
	s.SetOpen(true)
	froms := []netip.AddrPort{
		netip.MustParseAddrPort("192.0.2.3:1"), netip.MustParseAddrPort("[2001:db8::1]:65535"), netip.MustParseAddrPort("[::ffff:192.0.2.3]:1"),
	}
	f.Fuzz(func(t *testing.T, packet, control []byte) {
		var want, wantSource []byte
		for _, from := range froms {
			if tx, err := upstream.ParseBindingRequest(packet); err == nil && len(packet) != packetSize {
				want = upstream.Response(tx, netip.AddrPortFrom(from.Addr().Unmap(), from.Port()))
				wantSource = pktinfo.AppendSrc(nil, pktinfo.Dst(control))
			}
			if got, source := s.reply(packet, bytes.Clone(control), from); !bytes.Equal(got, want) || !bytes.Equal(source, wantSource) {
				t.Errorf("answer %x with %x, want %x with %x", got, source, want, wantSource)
			}
		}
		if n := s.counters.noLocalAddr.Value(); n != 0 {
			t.Errorf("without pktinfo, %d requests counted as without the address asked", n)
		}
	})
}

// The answer and the parsing of the address asked are all that a request costs in
// memory. A flood of other packets costs none.
func TestAllocations(t *testing.T) {
	s := Server{gateways: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}
	s.counters.init()
	control := append(make([]byte, 0, controlSize), pktinfo.AppendSrc(nil, netip.MustParseAddr("2001:db8::7"))...)
	request := upstream.Request(upstream.TxID{1})
	client, gateway := netip.MustParseAddrPort("[2001:db8::1]:1024"), netip.MustParseAddrPort("192.0.2.1:1024")
	for _, tt := range []struct {
		name   string
		open   bool
		packet []byte
		from   netip.AddrPort
		want   float64
	}{
		{"request", true, request, client, 2},
		{"gateway's request", true, request, gateway, 0},
		{"no request", true, make([]byte, 1000), client, 0},
		{"closed", false, request, client, 0},
	} {
		s.SetOpen(tt.open)
		s.refused.Store(1) // the first is logged
		if got := testing.AllocsPerRun(100, func() { s.reply(tt.packet, control, tt.from) }); got != tt.want {
			t.Errorf("%s: %v allocations, want %v", tt.name, got, tt.want)
		}
	}
}

// A panic costs the reply to one request, and the loop goes on. Here the counters of
// the server are missing.
func TestPanicEndsOneRequest(t *testing.T) {
	var log bytes.Buffer
	s := Server{log: zerolog.New(&log)}
	s.SetOpen(true)
	before := caught.Count()
	for range 3 {
		if reply, source := s.reply(upstream.Request(upstream.TxID{1}), nil, netip.MustParseAddrPort("192.0.2.3:1")); reply != nil || source != nil {
			t.Errorf("got %x and %x", reply, source)
		}
	}
	if n := caught.Count() - before; n != 3 {
		t.Errorf("%d panics counted, want 3", n)
	}
	if lines := strings.Count(log.String(), "\n"); lines != 1 || !strings.Contains(log.String(), `"level":"error"`) || !strings.Contains(log.String(), "stun.go") || strings.Contains(log.String(), "192.0.2.3") {
		t.Errorf("want one error with the stack and no address, got %s", log.String())
	}
}
