// Package relay is the DERP relay of one node. It builds on
// tailscale.com/derp/derpserver and adds the layers around a connection (see
// [Relay.Serve]), admission in process, and the dialing side of a mesh.
package relay

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"expvar"
	"fmt"
	"net/http"
	"net/netip"
	"sync/atomic"

	"github.com/rs/zerolog"
	"tailscale.com/derp/derpserver"
	"tailscale.com/types/key"

	"derpd/internal/httpserver"
)

// AdmitFunc decides about a client by its node key and address. An error
// refuses the client; the text is logged at debug level.
type AdmitFunc func(context.Context, key.NodePublic, netip.Addr) error

// Config is the configuration of a Relay.
type Config struct {
	// PrivateKey is the node key that clients see; see [LoadKey].
	PrivateKey key.NodePrivate

	// Admit decides about each client. Nil admits every client.
	Admit AdmitFunc

	// Names are the DNS names and addresses that clients dial. An empty list
	// stands for an address. Clients that dial an address send no server name.
	// Only clients of these names, or of a name of the certificate, get
	// derpserver's meta certificate.
	Names []string

	// NodeLimit returns the limit of a node that is admitted. Nil is no limit for any
	// node. It is called often and with locks held: it must not wait, and must not call
	// the Relay. The other nodes of a mesh have no rate.
	NodeLimit func(key.NodePublic) NodeLimit

	// DisallowApps are the app names, as clients advertise them, that are
	// refused (derper's --disallow-apps).
	DisallowApps []string

	// TellClients is whether clients get the reason why they are refused, and the
	// texts of [Relay.Tell] and [Relay.RunNodeLimits].
	TellClients bool

	// Home serves the paths that clients never request.
	Home http.Handler

	// BootstrapDNS serves /bootstrap-dns.
	BootstrapDNS http.Handler

	// Mesh is the configuration of the other nodes of the region.
	Mesh MeshConfig

	// TrustedProxies are the networks of the proxies in front. A proxy sends
	// the address of the client in X-Forwarded-For, or with ProxyProtocol in
	// the PROXY header. Each proxy must append to X-Forwarded-For. If a proxy
	// forwards the header unchanged, clients can forge their address.
	TrustedProxies []netip.Prefix

	// ProxyProtocol is whether connections of TrustedProxies may begin with a
	// PROXY header. X-Forwarded-For is then ignored, because the proxy forwards
	// the client's header unchanged.
	ProxyProtocol bool

	// Limits bound the connections.
	Limits Limits

	// Open reports whether anybody may use the relay now. Nil: if Admit is nil.
	Open func() bool

	// Misdirected is called when clients begin to arrive in a way that cannot
	// work, and not again before that has ended. It may be nil.
	Misdirected func(Misdirection)

	// GetCertificate returns the certificates of the public listener. Nil is
	// plain HTTP, for a proxy in front that terminates TLS.
	GetCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)

	Log zerolog.Logger
}

// Relay is one DERP node.
type Relay struct {
	config   Config
	server   *derpserver.Server
	places   *places
	sessions *sessions
	clients  *clients
	mesh     *Mesh
	names    names
	tls      *tls.Config // nil: plain HTTP
	own      ownPeers
	turns    *turns

	misdirected   *misdirections
	public, plain *http.Server
	closing       atomic.Bool // whether Close has begun
}

// New returns a relay. It has no clients before [Relay.Serve].
func New(c Config) (*Relay, error) {
	// Nearly every log line of derpserver is about a fault of a client, and
	// contains the client's address.
	log := c.Log.With().Str("component", "derp").Logger()
	server := derpserver.New(c.PrivateKey, func(format string, args ...any) {
		log.Debug().Msgf(format, args...)
	})
	server.SetTCPWriteTimeout(writeTimeout)
	server.SetDisallowedAppNames(c.DisallowApps)
	sessions := newSessions(c.Log)
	sessions.places = newPlaces(c)
	sessions.private, sessions.meshKey, sessions.of = c.PrivateKey, c.Mesh.Key, c.NodeLimit
	if c.TellClients {
		sessions.teller = newTeller(c)
	}
	if c.Admit != nil {
		server.SetVerifyClientURL(admissionURL(sessions.teller.admit(c.Admit)))
		server.SetVerifyClientURLFailOpen(false)
	}
	if err := server.SetMeshKey(meshKeyOf(c.Mesh)); err != nil {
		return nil, fmt.Errorf("setting mesh key: %w", err)
	}
	r := &Relay{
		config:   c,
		server:   server,
		places:   sessions.places,
		sessions: sessions,
		clients:  &clients{server: server, log: c.Log},
		mesh:     newMesh(c, server),
		names:    c.Names,

		misdirected: newMisdirections(c.Log, c.Misdirected),
	}
	r.mesh.dialed = r.places.remember
	r.places.own = r.own.has
	r.turns = newTurns(r.places.member, r.own.has)
	if c.GetCertificate != nil {
		r.tls = tlsConfig(server, r.names, r.turns, c.GetCertificate)
	}
	r.public = httpserver.Public(r.handler(), c.Log)
	r.plain = httpserver.Public(nil, c.Log)
	r.public.ConnContext, r.plain.ConnContext = withConn, withConn
	return r, nil
}

// meshKeyOf returns the mesh key of the configuration, or else a random one:
// [clients] needs a mesh key even without a mesh.
func meshKeyOf(c MeshConfig) string {
	if !c.Key.IsZero() {
		return c.Key.String()
	}
	random := make([]byte, 32)
	_, _ = rand.Read(random) // never fails
	return hex.EncodeToString(random)
}

// Run updates the list of [Relay.Clients] until ctx ends.
func (r *Relay) Run(ctx context.Context) error { return r.clients.run(ctx) }

// Clients returns the connected nodes, with the address of the latest
// connection.
func (r *Relay) Clients() map[key.NodePublic]netip.Addr { return r.clients.list() }

// Disconnect closes every connection of a node. [Config.Admit] decides about its
// next connection.
func (r *Relay) Disconnect(node key.NodePublic) error { return r.clients.disconnect(node) }

// Mesh returns the connections to the other nodes of the region.
func (r *Relay) Mesh() *Mesh { return r.mesh }

// Metrics returns the metrics of derpserver, with the names that derper uses.
func (r *Relay) Metrics() expvar.Var { return r.server.ExpVar(false) }

// PublicKey returns the node key that clients see.
func (r *Relay) PublicKey() key.NodePublic { return r.server.PublicKey() }
