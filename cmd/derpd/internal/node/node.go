// Package node is one relay: put together from its configuration, run, and
// stopped. Each file is one layer:
//
//   - node.go builds the parts, run.go runs and stops them
//   - listen*.go binds the sockets, certificates.go chooses the certificate manager
//   - admission.go connects the relay to the gate, and autoclose.go closes an open
//     relay when a tailscaled appears
//   - selfcheck.go, overload.go, eyes.go, checks.go, misdirected.go and metrics.go
//     observe; a new health check is one function and one line in checks.go
//   - public.go and region.go make the map, and mapcert.go remembers its pin
//   - connlimits.go reports the limits of connections, and nodelimits.go applies and
//     reports those of each node
//   - notices.go warns clients, updates.go looks for newer releases
package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"

	"derpd/certs"
	"derpd/cmd/derpd/internal/admin"
	"derpd/cmd/derpd/internal/config"
	"derpd/cmd/derpd/internal/host"
	"derpd/cmd/derpd/internal/nodelimits"
	"derpd/healthz"
	"derpd/internal/httpserver"
	"derpd/internal/release"
	"derpd/relay"
	"derpd/relay/admit"
	"derpd/relay/stun"
)

// Options is what a node needs beside its configuration.
type Options struct {
	// Gateways are the gateways of the container's network; see
	// [host.ContainerGateways].
	Gateways []netip.Addr

	// Start is when the process started.
	Start time.Time

	// Map receives the map once the relay serves.
	Map io.Writer

	// Roots stand for the roots that clients have; nil for those of this machine.
	Roots *x509.CertPool

	// Build is the build of derpd that runs.
	Build release.Build

	Log zerolog.Logger
}

// Node is one relay with everything around it, bound and ready to run.
type Node struct {
	config  *config.Config
	options Options
	log     zerolog.Logger

	listeners  *listeners
	relay      *relay.Relay
	stun       *stun.Server               // nil when off
	certs      certs.Manager              // nil in mode off
	gate       atomic.Pointer[admit.Gate] // nil when open; see autoclose.go
	nodeLimits *nodelimits.Limits
	bootstrap  *relay.BootstrapDNS
	health     *healthz.Health
	selfCheck  *healthz.SelfCheck
	probe      probeKeys
	eyes       *eyes
	updates    *updates // nil when off
	packets    *packets
	mapCert    mapCert

	plain      http.Handler // of the plain HTTP listener
	admin      *http.Server
	healthOnly *http.Server // nil when off

	// serving is closed when the self-check has succeeded for the first time.
	serving chan struct{}

	// found is valid once address is closed.
	address chan struct{}
	found   host.Addresses
}

// New binds every socket, and then reads or creates the files of the data
// directory. It writes nothing until all sockets are bound. A [BindError] is a
// fault of the configuration; another start may succeed after any other error.
func New(ctx context.Context, c *config.Config, o Options) (*Node, error) {
	l, err := listen(ctx, c.Listen)
	if err != nil {
		return nil, err
	}
	n := &Node{
		config: c, options: o, log: o.Log, listeners: l,
		probe: newProbeKeys(), eyes: newEyes(o.Roots), serving: make(chan struct{}), address: make(chan struct{}),
	}
	l.retry(func(peer net.Addr) bool { return n.relay.Own(peer) }, o.Log)
	if err := n.build(ctx); err != nil {
		l.close()
		return nil, err
	}
	return n, nil
}

func (n *Node) build(ctx context.Context) error {
	c := n.config
	var err error
	// The certificate comes first: without a name to make one for, the start
	// must fail before anything is written.
	if n.certs, err = n.certificates(ctx); err != nil {
		return err
	}
	if err := os.MkdirAll(c.Storage.DataDir, 0o700); err != nil {
		return fmt.Errorf("DERP_DATA_DIR: %w", err)
	}
	n.rememberCertName()
	private, err := relay.LoadOrCreateKey(c.Storage.NodeKeyFile())
	if err != nil {
		return fmt.Errorf("DERP_DATA_DIR: %w", err)
	}
	if !c.Open() {
		gate, err := n.newGate(c.Sources)
		if err != nil {
			return err
		}
		n.gate.Store(gate)
	}
	if n.nodeLimits, err = n.newNodeLimits(); err != nil {
		return err
	}
	n.bootstrap = relay.NewBootstrapDNS(c.Web.BootstrapDNS, n.log)
	if n.relay, err = relay.New(n.relayConfig(private)); err != nil {
		return err
	}
	if n.listeners.stun != nil {
		if n.stun, err = stun.New(stun.Config{Conn: n.listeners.stun, Gateways: n.options.Gateways, Log: n.log}); err != nil {
			return err
		}
	}
	n.selfCheck = n.newSelfCheck()
	if c.Updates.Every > 0 {
		n.updates = &updates{ask: release.New(n.options.Build, c.Updates.GoProxy).Ask, every: c.Updates.Every, log: n.log}
	}
	n.packets = &packets{count: n.relay.Packets}
	n.health = healthz.New(n.checks())
	n.plain = relay.RedirectHandler(c.PublicHTTPSPort(n.listeners.ports().https))
	if n.certs != nil {
		n.plain = n.certs.HTTPHandler(n.plain)
	}
	adminHost, _, _ := net.SplitHostPort(c.Listen.Admin)
	n.admin = httpserver.New(admin.Handler(admin.Config{
		Host: adminHost, Health: n.health.Handler(), Map: n.formatMap, Admission: n.admission, AcceptPin: n.acceptPin, Metrics: n.metrics,
	}), n.log)
	if n.listeners.health != nil {
		n.healthOnly = httpserver.New(n.health.StatusHandler(), n.log)
	}
	return nil
}

// relayConfig returns the configuration of the relay with a private key.
func (n *Node) relayConfig(private key.NodePrivate) relay.Config {
	c := n.config
	mesh := c.Mesh
	mesh.Describe = n.describe
	rc := relay.Config{
		PrivateKey:     private,
		Names:          c.Domains,
		Admit:          n.admit(),
		NodeLimit:      n.nodeLimit,
		DisallowApps:   c.Admission.DisallowApps,
		TellClients:    c.TellClients,
		Home:           c.Web.Home,
		BootstrapDNS:   n.bootstrap,
		Mesh:           mesh,
		TrustedProxies: c.Proxies.Trusted,
		ProxyProtocol:  c.Proxies.ProxyProtocol,
		Limits:         n.connectionLimits(),
		Open:           func() bool { return n.gate.Load() == nil },
		Misdirected:    n.misdirected,
		Log:            n.log,
	}
	if n.certs != nil {
		rc.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) { return n.certs.GetCertificate(hello) }
	}
	return rc
}
