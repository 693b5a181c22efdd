package relay

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"tailscale.com/net/stun"
)

// What is written in place is what upstream would send.
func TestPutResponse(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var b [maxSTUNResponse]byte
	for range 10_000 {
		var tx stun.TxID
		var raw [16]byte
		for i := range tx {
			tx[i] = byte(random.Uint32())
		}
		for i := range raw {
			raw[i] = byte(random.Uint32())
		}
		v4 := netip.AddrFrom4([4]byte(raw[:4]))
		for _, addr := range []netip.Addr{v4, netip.AddrFrom16(raw), netip.AddrFrom16(v4.As16()).Unmap()} {
			// The same buffer again, with what was there before.
			seen := netip.AddrPortFrom(addr, uint16(random.Uint32()))
			if got, want := b[:putResponse(&b, tx, seen)], stun.Response(tx, seen); !bytes.Equal(got, want) {
				t.Fatalf("%v for %s: %x, want %x", tx, seen, got, want)
			}
		}
	}
}

// stunSeeds are requests, and what is nearly one.
func stunSeeds() [][]byte {
	request := stun.Request(stun.TxID{1, 2, 3})
	flipped := bytes.Clone(request)
	flipped[len(flipped)-1] ^= 1
	generic := append(bytes.Clone(request[:20]), request[32:]...) // without SOFTWARE
	binary.BigEndian.PutUint16(generic[2:], 8)
	indication := bytes.Clone(request)
	indication[1] = 0x11
	return [][]byte{
		request, flipped, generic, indication, request[:39], request[:36], request[:20],
		{},
		{0},
		append(bytes.Clone(request), 0), append(bytes.Clone(request), request[20:32]...),
		stun.Response(stun.TxID{1}, netip.MustParseAddrPort("192.0.2.1:1")), make([]byte, maxSTUNPacket),
	}
}

// The cheap look never says no to what the parser accepts.
func FuzzPlausibleSTUN(f *testing.F) {
	for _, seed := range stunSeeds() {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		if _, err := stun.ParseBindingRequest(packet); err == nil && !plausible(packet) {
			t.Errorf("%x is a request, and would not be answered", packet)
		}
	})
}
