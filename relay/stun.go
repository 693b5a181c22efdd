package relay

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/net/pktinfo"
	"tailscale.com/net/stun"
)

const (
	// maxSTUNPacket is larger than any binding request that a client sends,
	// in bytes; what is longer is cut off and refused.
	maxSTUNPacket = 1500

	// maxSTUNResponse is the response to a client on IPv6, in bytes: a header
	// of 20, and the attribute XOR-MAPPED-ADDRESS.
	maxSTUNResponse = 20 + 4 + 4 + 16

	// stunReceiveBuffer is what the socket asks for, in bytes: room for more
	// than a thousand requests while derpd has no turn on the processor. The
	// kernel gives at most net.core.rmem_max.
	stunReceiveBuffer = 1 << 20

	// saneReceiveBuffer is, in bytes as the kernel counts them, about a
	// hundred requests. Linux gives three times as many by default.
	saneReceiveBuffer = 80 << 10

	// readPause keeps a socket that fails on and on from taking a processor.
	readPause = 10 * time.Millisecond
)

// STUNConfig is what a STUN server needs.
type STUNConfig struct {
	// Conn is the socket. The server takes ownership of it.
	Conn *net.UDPConn

	// Gateways are the addresses from which a container's engine hands
	// packets over in place of their senders. A request from there has no
	// answer: it would be the gateway's address, and the client would take
	// its NAT for one that gives each destination another address, and give
	// up direct connections (tailscale#17565).
	Gateways []netip.Addr

	Log zerolog.Logger
}

// STUN answers STUN binding requests (RFC 8489) on one UDP socket. Clients
// choose their home region by STUN alone, so it starts closed and answers only
// while somebody who watches the relay keeps it open with [STUN.SetOpen].
type STUN struct {
	conn     *net.UDPConn
	log      zerolog.Logger
	pktinfo  bool // whether replies leave from the address that was asked
	open     atomic.Bool
	gateways gateways
}

// NewSTUN returns a server that is closed.
func NewSTUN(c STUNConfig) (*STUN, error) {
	s := &STUN{conn: c.Conn, log: c.Log, gateways: gateways{addrs: c.Gateways, log: c.Log}}
	switch err := pktinfo.Enable(c.Conn); {
	case err == nil:
		s.pktinfo = true
	case !errors.Is(err, errors.ErrUnsupported):
		return nil, fmt.Errorf("asking for the destination address of STUN requests: %w", err)
	}
	if err := c.Conn.SetReadBuffer(stunReceiveBuffer); err != nil {
		return nil, fmt.Errorf("setting the receive buffer of STUN: %w", err)
	}
	if size := s.receiveBuffer(); size > 0 && size < saneReceiveBuffer {
		s.log.Warn().Int("bytes", size).Msg("requests to STUN are lost when many come at once: its receive buffer is too small; raise net.core.rmem_max on the host, sysctl net.core.rmem_max=212992")
	}
	return s, nil
}

// SetOpen says whether requests are answered. While closed they are read and
// dropped, so that clients fail over to another region.
func (s *STUN) SetOpen(open bool) { s.open.Store(open) }

// Open reports whether requests are answered.
func (s *STUN) Open() bool { return s.open.Load() }

// Run answers requests until ctx ends, and closes the socket.
func (s *STUN) Run(ctx context.Context) error {
	defer func() { _ = s.conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = s.conn.Close() })
	defer stop()
	err := s.serveBatches(ctx)
	if errors.Is(err, errors.ErrUnsupported) {
		err = s.serveSingly(ctx)
	}
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// serveSingly is for systems that cannot do it in batches.
func (s *STUN) serveSingly(ctx context.Context) error {
	var buf [maxSTUNPacket]byte
	var response [maxSTUNResponse]byte
	var oob, oobOut [256]byte
	for {
		n, oobn, _, from, err := s.conn.ReadMsgUDPAddrPort(buf[:], oob[:])
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			// An ICMP error of an earlier reply; the socket is fine.
			s.log.Debug().Err(err).Msg("stun read failed")
			if !pause(ctx, readPause) {
				return nil
			}
			continue
		}
		if !s.open.Load() || !plausible(buf[:n]) {
			continue
		}
		tx, err := stun.ParseBindingRequest(buf[:n])
		if err != nil {
			continue
		}
		seen := netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		if s.gateways.refuse(seen.Addr()) {
			continue
		}
		out := oobOut[:0]
		if s.pktinfo {
			out = pktinfo.AppendSrc(out, pktinfo.Dst(oob[:oobn]))
		}
		if _, _, err := s.conn.WriteMsgUDPAddrPort(response[:putResponse(&response, tx, seen)], out, from); err != nil {
			s.log.Debug().Err(err).Msg("stun reply failed")
		}
	}
}

// plausible is false for most of what is no request, at less than the price of
// parsing it. It must hold for everything that [stun.ParseBindingRequest]
// accepts: a header of 20 bytes, the client's name in 12, a checksum in at least
// 4, and each attribute padded to 4.
func plausible(b []byte) bool {
	return len(b) >= 20+12+4 && len(b)%4 == 0 && string(b[:2]) == "\x00\x01" && string(b[4:8]) == magicCookie
}

// magicCookie tells STUN from other protocols (RFC 8489 §5).
const magicCookie = "\x21\x12\xa4\x42"

// putResponse writes what [stun.Response] would return, and returns its length.
// The address must be valid, and not IPv4 mapped to IPv6.
func putResponse(b *[maxSTUNResponse]byte, tx stun.TxID, addr netip.AddrPort) int {
	const success, xorMappedAddress, ipv4, ipv6 = 0x0101, 0x0020, 1, 2
	size, family := 4, byte(ipv4)
	ip := b[28:]
	if addr.Addr().Is4() {
		a := addr.Addr().As4()
		copy(ip, a[:])
	} else {
		size, family = 16, ipv6
		a := addr.Addr().As16()
		copy(ip, a[:])
	}
	binary.BigEndian.PutUint16(b[0:], success)
	binary.BigEndian.PutUint16(b[2:], uint16(8+size))
	copy(b[4:], magicCookie)
	copy(b[8:], tx[:])
	binary.BigEndian.PutUint16(b[20:], xorMappedAddress)
	binary.BigEndian.PutUint16(b[22:], uint16(4+size))
	b[24], b[25] = 0, family
	// Port and address are disguised with what stands in the header, so that
	// no router on the way mistakes them for its own and changes them.
	binary.BigEndian.PutUint16(b[26:], addr.Port()^binary.BigEndian.Uint16(b[4:]))
	for i := range ip[:size] {
		ip[i] ^= b[4+i]
	}
	return 28 + size
}

// pause waits for d and reports whether ctx is still alive.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
