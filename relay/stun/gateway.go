package stun

import (
	"errors"
	"net/netip"
	"slices"
	"time"
)

// ErrGateway explains why requests from a gateway get no reply, and names the fix.
var ErrGateway = errors.New("the container engine forwards STUN requests from its own address, and the client's address is lost; " +
	"publish STUN on 0.0.0.0 only, run the relay on the host's network, or set DERP_PUBLIC_IPV6=none and use the new map")

// refuse reports whether the sender is a gateway. It counts the refused requests.
func (s *Server) refuse(from netip.Addr) bool {
	if !slices.Contains(s.gateways, from.WithZone("")) {
		return false
	}
	s.lastRefused.Store(time.Now().UnixNano())
	if s.refused.Add(1) == 1 {
		s.log.Warn().Stringer("gateway", from).Err(ErrGateway).Msg("stun requests from the container's gateway are not answered")
	}
	return true
}

// Refused returns the number of requests from a gateway, and the time of the last.
func (s *Server) Refused() (count uint64, last time.Time) {
	if count = s.refused.Load(); count > 0 {
		last = time.Unix(0, s.lastRefused.Load())
	}
	return count, last
}
