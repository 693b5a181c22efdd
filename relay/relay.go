// Package relay is the DERP relay and the STUN server of one node. It is built
// on tailscale.com/derp/derpserver and net/stun; what it adds is the routes
// around them, admission in process, and a STUN socket that can be closed
// while the relay cannot serve.
package relay

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"expvar"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/rs/zerolog"
	"tailscale.com/derp/derpserver"
	"tailscale.com/types/key"
)

// acmeTLS1 is the ALPN protocol of the TLS-ALPN-01 challenge (RFC 8737).
const acmeTLS1 = "acme-tls/1"

// AdmitFunc decides whether the node with the given key, connecting from the
// given address, may use the relay. A non-nil error refuses it; its text is
// logged at debug level.
type AdmitFunc func(context.Context, key.NodePublic, netip.Addr) error

// Config is what a Relay needs.
type Config struct {
	// PrivateKey is the node key that clients see; see [LoadKey].
	PrivateKey key.NodePrivate

	// Admit decides who may connect. Nil admits everybody.
	Admit AdmitFunc

	// DisallowApps are the app names that may not connect, as clients
	// advertise them (derper's --disallow-apps).
	DisallowApps []string

	// Home serves every path that has no meaning for clients.
	Home http.Handler

	// BootstrapDNS answers /bootstrap-dns.
	BootstrapDNS http.Handler

	// Mesh is the other nodes of the region.
	Mesh MeshConfig

	// TrustedProxies are the networks whose X-Forwarded-For tells the address
	// of a client. Each of their proxies must append to it: one that only
	// passes it on lets clients choose their address.
	TrustedProxies []netip.Prefix

	Log zerolog.Logger
}

// Relay is one DERP node.
type Relay struct {
	server  *derpserver.Server
	handler http.Handler
	clients *clients
	mesh    *Mesh
}

// New returns a relay that serves nothing until its handler is mounted.
func New(c Config) (*Relay, error) {
	// derpserver names client addresses in its lines, and nearly all of
	// them are faults of clients.
	log := c.Log.With().Str("component", "derp").Logger()
	server := derpserver.New(c.PrivateKey, func(format string, args ...any) {
		log.Debug().Msgf(format, args...)
	})
	server.SetDisallowedAppNames(c.DisallowApps)
	if c.Admit != nil {
		server.SetVerifyClientURL(admissionURL(c.Admit))
		server.SetVerifyClientURLFailOpen(false)
	}
	var meshKey string
	if !c.Mesh.Key.IsZero() {
		meshKey = c.Mesh.Key.String()
	} else {
		// Made anew at each start and known to this process only; see
		// [clients].
		random := make([]byte, 32)
		_, _ = rand.Read(random) // never fails
		meshKey = hex.EncodeToString(random)
	}
	if err := server.SetMeshKey(meshKey); err != nil {
		return nil, fmt.Errorf("setting mesh key: %w", err)
	}
	mesh := newMesh(c, server)
	return &Relay{server: server, handler: forwarded(c.TrustedProxies, routes(server, newSessions(c.Log), mesh, c)), clients: &clients{server: server, log: c.Log}, mesh: mesh}, nil
}

// Run keeps the list of [Relay.Clients] until ctx ends.
func (r *Relay) Run(ctx context.Context) error { return r.clients.run(ctx) }

// Clients is who is connected, with the address of the latest connection.
func (r *Relay) Clients() map[key.NodePublic]netip.Addr { return r.clients.list() }

// Disconnect closes every connection of a node. Whether it may come back is
// up to [Config.Admit].
func (r *Relay) Disconnect(node key.NodePublic) error { return r.clients.disconnect(node) }

// Mesh is the way to the other nodes of the region, if there are any.
func (r *Relay) Mesh() *Mesh { return r.mesh }

// Metrics are upstream's, by the names under which derper publishes them.
func (r *Relay) Metrics() expvar.Var { return r.server.ExpVar(false) }

// PublicKey is the key by which clients know this node.
func (r *Relay) PublicKey() key.NodePublic { return r.server.PublicKey() }

// Handler serves the HTTPS listener.
func (r *Relay) Handler() http.Handler { return r.handler }

// Close drops every client and waits until they are gone.
func (r *Relay) Close() error { return r.server.Close() }

// TLSConfig is the configuration of the HTTPS listener. The certificate comes
// from getCertificate; behind it goes the meta certificate that lets clients
// start without waiting for an HTTP response (derpserver's fast start).
func (r *Relay) TLSConfig(getCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	c := &tls.Config{
		GetCertificate: getCertificate,
		MinVersion:     tls.VersionTLS12,
		// Never h2: DERP hijacks the connection, which HTTP/2 cannot give.
		NextProtos: []string{"http/1.1", acmeTLS1},
	}
	r.server.ModifyTLSConfigToAddMetaCert(c)
	withMeta := c.GetCertificate
	c.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		// A challenge certificate is answered as it is (RFC 8737 §3).
		if slices.Contains(hello.SupportedProtos, acmeTLS1) {
			return getCertificate(hello)
		}
		return withMeta(hello)
	}
	return c
}

func routes(server *derpserver.Server, sessions *sessions, mesh *Mesh, c Config) http.Handler {
	mux := http.NewServeMux()
	// A WebSocket has frames of its own: its connection is no session.
	mux.Handle("/derp", derpserver.AddWebSocketSupport(server, sessions.handler(derpserver.Handler(server))))
	// Clients of different ages ask for one or the other.
	mux.HandleFunc("/derp/probe", derpserver.ProbeHandler)
	mux.HandleFunc("/derp/latency-check", derpserver.ProbeHandler)
	mux.HandleFunc("/generate_204", derpserver.ServeNoContent)
	mux.Handle("/bootstrap-dns", browserHeaders(c.BootstrapDNS))
	mux.HandleFunc("/robots.txt", serveRobots)
	home := readOnly(c.Home)
	mux.Handle("/", home)
	mux.Handle(meshPath, mesh.serveNode(home))
	return mux
}

// RedirectHandler serves the plain HTTP listener: the captive portal check,
// and a redirect to HTTPS on the given public port for everything else.
func RedirectHandler(httpsPort int) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/generate_204", derpserver.ServeNoContent)
	mux.Handle("/", readOnly(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = strings.Trim(r.Host, "[]") // without a port
		}
		if host == "" {
			http.Error(w, "missing Host", http.StatusBadRequest)
			return
		}
		// The scheme is fixed, so a client can be sent nowhere but to the
		// host that it named itself.
		target := *r.URL
		target.Scheme = "https"
		target.Host = strings.TrimSuffix(net.JoinHostPort(host, strconv.Itoa(httpsPort)), ":443")
		http.Redirect(w, r, target.String(), http.StatusFound)
	})))
	return mux
}

func serveRobots(w http.ResponseWriter, _ *http.Request) {
	_, _ = w.Write([]byte("User-agent: *\nDisallow: /\n"))
}

// readOnly refuses methods that have no meaning here. CONNECT is one of them:
// whoever sends it is looking for an open proxy.
func readOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// browserHeaders sets what upstream's tsweb.AddBrowserHeaders sets. It leaves out
// Strict-Transport-Security: that would bind every other service under the
// operator's domain as well. What scanners ask for, the home page and
// robots.txt, does without: it has nothing to protect, and by these very headers
// a search engine for hosts finds every derper.
func browserHeaders(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'; form-action 'none'; base-uri 'self'; block-all-mixed-content")
		h.Set("X-Content-Type-Options", "nosniff")
		next.ServeHTTP(w, r)
	})
}
