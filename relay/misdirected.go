package relay

import (
	"net/netip"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// Misdirection is a way in which clients arrive that cannot work. The cause is a
// proxy or a port mapping in front of the relay.
type Misdirection string

// The misdirections. The values are labels of metrics.
const (
	// NoUpgrade is a request to /derp without Upgrade.
	NoUpgrade Misdirection = "no-upgrade"

	// TLSOnPlainPort is a TLS handshake on a port for plain HTTP.
	TLSOnPlainPort Misdirection = "tls-on-plain-port"

	// PlainOnTLSPort is an HTTP request without TLS on the port for TLS.
	PlainOnTLSPort Misdirection = "plain-on-tls-port"

	// DERPOnPlainPort is a request to /derp on the port of [Relay.ServePlain].
	DERPOnPlainPort Misdirection = "derp-on-plain-port"

	// UntrustedProxyHeader is a PROXY header of an address outside
	// Config.TrustedProxies.
	UntrustedProxyHeader Misdirection = "untrusted-proxy-header"

	// UnexpectedProxyHeader is a PROXY header without Config.ProxyProtocol.
	UnexpectedProxyHeader Misdirection = "unexpected-proxy-header"
)

// Misdirections are all misdirections, in the order of [Relay.Misdirected].
func Misdirections() []Misdirection {
	return []Misdirection{NoUpgrade, TLSOnPlainPort, PlainOnTLSPort, DERPOnPlainPort, UntrustedProxyHeader, UnexpectedProxyHeader}
}

// A misdirected client retries for as long as it runs. A scanner sends one burst
// of connections, such as the ten handshakes of a fingerprint. Arrivals are thus
// a state only when they repeat.
const (
	misdirectedApart = 5 * time.Second // closer arrivals count as one
	misdirectedTimes = 3               // arrivals that make a state
	misdirectedFor   = 5 * time.Minute // until the state ends after the last arrival
)

// recursFor is the time after which PROXY headers from one address are evidence of a
// proxy. Clients connect through a proxy all day, and a scanner stops earlier.
const recursFor = 5 * time.Minute

// MisdirectedState is the state of one [Misdirection].
type MisdirectedState struct {
	Misdirection Misdirection
	Count        uint64    // all arrivals since the start, those of scanners included
	Now          bool      // whether clients of this relay arrive so now
	Last         time.Time // last arrival of a client; zero before the first
}

// misdirections counts arrivals. Each arrival is counted. The state depends only on
// arrivals with evidence of a client of this relay; see arrival.go.
type misdirections struct {
	log   zerolog.Logger
	begun func(Misdirection) // called when a state begins; may be nil

	mu  sync.Mutex
	all map[Misdirection]*arrivals // of [Misdirections] alone; guarded by mu
}

// arrivals are the arrivals of one kind.
type arrivals struct {
	count uint64
	times int       // arrivals of clients in this state, misdirectedApart from each other
	last  time.Time // last arrival of a client
	apart time.Time // last arrival that increased times

	peer        netip.Addr // address whose PROXY headers may recur
	since, seen time.Time  // first and last header of peer
}

func newMisdirections(log zerolog.Logger, begun func(Misdirection)) *misdirections {
	return &misdirections{log: log, begun: begun, all: make(map[Misdirection]*arrivals)}
}

// note counts an arrival from peer. client is whether there is evidence of a client
// of this relay.
func (m *misdirections) note(kind Misdirection, client bool, peer string) {
	m.log.Debug().Str("reason", string(kind)).Bool("client", client).Str("peer", peer).Msg("connection arrives misdirected")
	if m.add(kind, client, peer, time.Now()) && m.begun != nil {
		m.begun(kind)
	}
}

// add reports whether this arrival begins a state.
func (m *misdirections) add(kind Misdirection, client bool, peer string, now time.Time) (begins bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a := m.all[kind]
	if a == nil {
		a = new(arrivals)
		m.all[kind] = a
	}
	a.count++
	if kind == UntrustedProxyHeader || kind == UnexpectedProxyHeader {
		client = a.recurs(peer, now) || client
	}
	if !client {
		return false
	}
	if now.Sub(a.last) >= misdirectedFor {
		a.times = 0
	}
	a.last = now
	if a.times > 0 && now.Sub(a.apart) < misdirectedApart {
		return false
	}
	a.apart = now
	a.times++
	return a.times == misdirectedTimes
}

// recurs reports whether PROXY headers of peer have been coming for recursFor.
// Proxies in the internet often send the header alone, without a client's bytes.
func (a *arrivals) recurs(peer string, now time.Time) bool {
	addr, _ := netip.ParseAddrPort(peer)
	switch {
	case now.Sub(a.seen) >= recursFor:
		a.peer, a.since, a.seen = addr.Addr(), now, now
	case a.peer == addr.Addr():
		a.seen = now
	default:
		return false
	}
	return now.Sub(a.since) >= recursFor
}

// states returns the state of every kind.
func (m *misdirections) states(now time.Time) []MisdirectedState {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []MisdirectedState
	for _, kind := range Misdirections() {
		s := MisdirectedState{Misdirection: kind}
		if a := m.all[kind]; a != nil {
			s.Count, s.Last = a.count, a.last
			s.Now = a.times >= misdirectedTimes && now.Sub(a.last) < misdirectedFor
		}
		list = append(list, s)
	}
	return list
}

// Misdirected returns how clients and scanners arrived that cannot be served.
func (r *Relay) Misdirected() []MisdirectedState { return r.misdirected.states(time.Now()) }
