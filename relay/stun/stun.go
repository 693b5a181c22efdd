// Package stun answers STUN binding requests (RFC 8489) of Tailscale's clients.
package stun

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
	upstream "tailscale.com/net/stun"

	"derpd/internal/accept"
	"derpd/internal/caught"
)

const (
	packetSize    = 1500    // buffer of one packet; a request has 40 bytes
	controlSize   = 128     // room for the pktinfo messages of IPv4 and of IPv6
	receiveBuffer = 1 << 20 // over a thousand requests; the kernel's limit is net.core.rmem_max
)

// Config configures a [Server].
type Config struct {
	Conn *net.UDPConn // closed by Run
	Log  zerolog.Logger

	// Gateways are addresses from which a container engine forwards packets of
	// other senders. Their requests get no reply, because the reply would contain
	// the gateway's address. A client would then assume a hard NAT and give up
	// direct connections (tailscale/tailscale#17565).
	Gateways []netip.Addr
}

// Server answers requests on one socket while it is open. It starts closed. Clients
// choose their home region by STUN alone, so only a relay that works may open it.
type Server struct {
	conn     *net.UDPConn
	log      zerolog.Logger
	serve    func(context.Context) error // answers requests until a read fails
	pktinfo  bool                        // the kernel reports the address that a request was sent to
	open     atomic.Bool
	counters counters
	failures *accept.Failures

	gateways    []netip.Addr
	refused     atomic.Uint64 // requests from a gateway
	lastRefused atomic.Int64  // Unix time in nanoseconds, stored before refused grows
}

// New returns a closed server. If New fails, the caller must close the socket.
func New(c Config) (*Server, error) {
	s := &Server{conn: c.Conn, log: c.Log, gateways: c.Gateways, failures: accept.NewFailures("stun", c.Log)}
	s.counters.init()
	err := pktinfo.Enable(c.Conn)
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return nil, fmt.Errorf("enabling pktinfo on the STUN socket: %w", err)
	}
	s.pktinfo = err == nil
	if err := c.Conn.SetReadBuffer(receiveBuffer); err != nil {
		return nil, fmt.Errorf("setting the receive buffer of the STUN socket: %w", err)
	}
	if !s.useBatches() {
		s.serve = s.serveSingly
	}
	return s, nil
}

// SetOpen sets whether requests get replies. A closed server drops them.
func (s *Server) SetOpen(open bool) { s.open.Store(open) }

// Open reports whether requests get replies.
func (s *Server) Open() bool { return s.open.Load() }

// Run answers requests until ctx ends or the socket is closed. It returns nil, with
// the socket closed.
func (s *Server) Run(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = s.conn.Close() })()
	for {
		err := s.serve(ctx)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		s.counters.readError.Add(1)
		select {
		case <-time.After(s.failures.Failed(err)):
		case <-ctx.Done():
		}
	}
}

// reply returns the reply to a packet, or nil. It also returns the control message
// that sends the reply from the address of the request, in the memory of control. A
// panic ends that request alone.
func (s *Server) reply(packet, control []byte, from netip.AddrPort) (reply, source []byte) {
	if !s.open.Load() {
		return nil, nil
	}
	defer func() {
		if v := recover(); v != nil {
			caught.Panic(s.log, "STUN request", v)
			reply, source = nil, nil
		}
	}()
	tx, err := upstream.ParseBindingRequest(packet)
	if err != nil || len(packet) == packetSize { // a full buffer may lack the end of a packet
		s.counters.notSTUN.Add(1)
		return nil, nil
	}
	client := netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	if s.refuse(client.Addr()) {
		return nil, nil
	}
	family := s.counters.ipv6
	if client.Addr().Is4() {
		family = s.counters.ipv4
	}
	family.Add(1)
	asked := pktinfo.Dst(control)
	if s.pktinfo && !asked.IsValid() {
		s.counters.noLocalAddr.Add(1)
	}
	return upstream.Response(tx, client), pktinfo.AppendSrc(control[:0], asked)
}

// sent counts replies that were sent, or failed with err.
func (s *Server) sent(replies int, err error) {
	counter := s.counters.success
	if err != nil {
		counter = s.counters.writeError
		s.log.Debug().Err(err).Int("replies", replies).Msg("stun reply failed")
	}
	counter.Add(int64(replies))
}
