package relay

import (
	"context"
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

// maxSTUNPacket is larger than any binding request that net/stun accepts, in
// bytes; what is longer is cut off and refused.
const maxSTUNPacket = 1500

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
	return s, nil
}

// SetOpen says whether requests are answered. While closed they are read and
// dropped, so that clients fail over to another region.
func (s *STUN) SetOpen(open bool) { s.open.Store(open) }

// Open reports whether requests are answered.
func (s *STUN) Open() bool { return s.open.Load() }

// Run answers requests until ctx ends, and closes the socket.
func (s *STUN) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = s.conn.Close() })
	defer stop()

	var buf [maxSTUNPacket]byte
	var oob, oobOut [256]byte
	for {
		n, oobn, _, from, err := s.conn.ReadMsgUDPAddrPort(buf[:], oob[:])
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			// An ICMP error of an earlier reply; the socket is fine.
			s.log.Debug().Err(err).Msg("stun read failed")
			if !pause(ctx, 10*time.Millisecond) {
				return nil
			}
			continue
		}
		if !s.open.Load() {
			continue
		}
		tx, err := stun.ParseBindingRequest(buf[:n])
		if err != nil {
			continue
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		if s.gateways.refuse(from.Addr()) {
			continue
		}
		out := oobOut[:0]
		if s.pktinfo {
			out = pktinfo.AppendSrc(out, pktinfo.Dst(oob[:oobn]))
		}
		if err := s.reply(stun.Response(tx, from), out, from); err != nil {
			s.log.Debug().Err(err).Msg("stun reply failed")
		}
	}
}

func (s *STUN) reply(packet, oob []byte, to netip.AddrPort) error {
	if len(oob) == 0 {
		_, err := s.conn.WriteToUDPAddrPort(packet, to)
		return err
	}
	_, _, err := s.conn.WriteMsgUDPAddrPort(packet, oob, to)
	return err
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
