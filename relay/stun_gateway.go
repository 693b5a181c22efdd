package relay

import (
	"errors"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
)

// ErrGateway is why a STUN request from a container's own gateway has no
// answer. Its text ends with the fix.
var ErrGateway = errors.New("the container's engine hands STUN requests over in its own name, and the address of the client is lost; " +
	"publish STUN on 0.0.0.0 only, run the relay on the host's network, or set DERP_PUBLIC_IPV6=none and use the new map")

// gateways refuses requests from the addresses that stand for somebody else.
type gateways struct {
	addrs []netip.Addr
	log   zerolog.Logger

	count atomic.Uint64
	last  atomic.Int64 // Unix time in nanoseconds
}

// refuse reports whether the request is not to be answered, and counts it.
func (g *gateways) refuse(from netip.Addr) bool {
	if !slices.Contains(g.addrs, from.WithZone("")) {
		return false
	}
	g.last.Store(time.Now().UnixNano())
	if g.count.Add(1) == 1 {
		g.log.Warn().Stringer("gateway", from).Err(ErrGateway).Msg("stun requests from the container's gateway are not answered")
	}
	return true
}

// Refused is how many requests from a gateway had no answer, and when the last
// of them came; see [STUNConfig.Gateways].
func (s *STUN) Refused() (count uint64, last time.Time) {
	if count = s.gateways.count.Load(); count == 0 {
		return 0, time.Time{}
	}
	return count, time.Unix(0, s.gateways.last.Load())
}
