package relay

import (
	"net/netip"
	"time"
)

// Limits bound the connections of both listeners. 0 is no limit.
//
// A connection is waiting until derpserver admits its node. Connections of strangers,
// HTTP requests and refused nodes wait until they are closed. An address is an IPv4
// address, or an IPv6 network of 64 bits, which is what one customer gets. TrustedProxies
// do not count as addresses: the address is then that of the client.
//
// On a relay with admission, addresses of admitted nodes are known. Waiting connections
// of known addresses do not count as Strangers, and an eighth of Connections is for known
// addresses alone.
type Limits struct {
	// Connections is the number of connections.
	Connections int

	// Strangers is the number of waiting connections from unknown addresses. Another
	// one closes an older one; see [places.crowded].
	Strangers int

	// PerAddress is the number of connections of one address that wait. On an open
	// relay connected clients count too.
	PerAddress int

	// AcceptRate is the number of new connections a second from one address, and
	// AcceptBurst the number that may come at once.
	AcceptRate, AcceptBurst int

	// Shared are networks of gateways that hide the addresses of many clients.
	// PerAddress and AcceptRate do not apply to them.
	Shared []netip.Prefix
}

// Limit is one of the limits. The values are labels of metrics.
type Limit string

// The limits.
const (
	LimitConnections Limit = "connections"
	LimitStrangers   Limit = "strangers"
	LimitPerAddress  Limit = "per-address"
	LimitAcceptRate  Limit = "accept-rate"
)

// AllLimits are the limits, in the order of [Places.Limited].
func AllLimits() []Limit {
	return []Limit{LimitConnections, LimitStrangers, LimitPerAddress, LimitAcceptRate}
}

// Places is a state of the connections.
type Places struct {
	Open    int // all connections
	Waiting int // those without an admitted node
	Limited []LimitCount
}

// LimitCount is how often a limit was reached. Each time one connection was closed: the
// new one, or an older one in its favor.
type LimitCount struct {
	Limit Limit
	Count uint64
	Last  time.Time // zero before the first
}

// Within reports whether the limit was reached within the last d.
func (l LimitCount) Within(d time.Duration) bool { return l.Count > 0 && time.Since(l.Last) < d }
