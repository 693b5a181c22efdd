package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"derpd/certs"
	"derpd/cmd/derpd/internal/host"
	"derpd/healthz"
	"derpd/internal/httpserver"
	"derpd/relay"
	"derpd/relay/admit"
	"derpd/relay/derpmap"
	"derpd/relay/stun"
)

// stopTimeout bounds the stop: a container manager starts the next relay only
// when this one is gone.
const stopTimeout = 800 * time.Millisecond

// serve is the command `derpd`. It returns nil when ctx ended it.
func serve(ctx context.Context, start time.Time, args, env []string, stdout, stderr io.Writer) error {
	if len(args) > 0 {
		return noStart{fmt.Errorf("serve: unexpected argument %q; configuration is by environment variables", args[0])}
	}
	c, err := loadConfig(env)
	if err != nil {
		return configError(err)
	}
	c.gateways = host.ContainerGateways()
	log := newLogger(c, stderr)
	if limit := host.LimitMemory(); limit > 0 {
		log.Debug().Int64("bytes", limit).Msg("memory limit set below the container's")
	}
	n, err := newNode(ctx, start, c, log, stdout)
	if err != nil {
		return err
	}
	return runTasks(ctx, n.tasks(), log)
}

// node is one relay with everything around it, bound and ready to run.
type node struct {
	config *config
	log    zerolog.Logger
	start  time.Time
	stdout io.Writer

	listeners *listeners
	relay     *relay.Relay
	stun      *stun.Server  // nil when off
	certs     certs.Manager // nil in mode off
	gate      *admit.Gate   // nil when open
	bootstrap *relay.BootstrapDNS
	health    *healthz.Health
	selfCheck *healthz.SelfCheck
	probe     probeKeys

	admin, healthOnly *http.Server // healthOnly is nil when off

	// serving is closed when the self-check has succeeded for the first time.
	serving chan struct{}

	// address is closed when found is set.
	address chan struct{}
	found   host.Addresses
}

// newNode binds everything, then reads or makes what is kept on disk. Until
// all sockets are bound nothing is written.
func newNode(ctx context.Context, start time.Time, c *config, log zerolog.Logger, stdout io.Writer) (*node, error) {
	l, err := listen(ctx, c)
	if err != nil {
		return nil, configError(err)
	}
	n := &node{
		config: c, log: log, start: start, stdout: stdout, listeners: l,
		probe: newProbeKeys(), serving: make(chan struct{}), address: make(chan struct{}),
	}
	if err := n.build(ctx); err != nil {
		// Not a matter of the configuration, which was found good: a full
		// disk, or no network yet. Another start may mend it.
		l.close()
		return nil, err
	}
	return n, nil
}

func (n *node) build(ctx context.Context) error {
	c := n.config
	var err error
	// First, since it may find that there is nothing to make a certificate
	// for: then nothing is written.
	if n.certs, err = n.certificates(ctx); err != nil {
		return err
	}
	if err := os.MkdirAll(c.dataDir, 0o700); err != nil {
		return fmt.Errorf("DERP_DATA_DIR: %w", err)
	}
	private, err := relay.LoadOrCreateKey(c.nodeKeyFile())
	if err != nil {
		return fmt.Errorf("DERP_DATA_DIR: %w", err)
	}
	if n.gate, err = newGate(c, n.log); err != nil {
		return err
	}
	n.bootstrap = relay.NewBootstrapDNS(c.bootstrap, n.log)
	mesh := c.mesh
	mesh.Describe = n.describe
	var getCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	if n.certs != nil {
		// Not a method value: tests replace n.certs.
		getCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) { return n.certs.GetCertificate(hello) }
	}
	n.relay, err = relay.New(relay.Config{
		PrivateKey:     private,
		Admit:          n.admit(),
		DisallowApps:   c.disallowApps,
		Home:           c.home,
		BootstrapDNS:   n.bootstrap,
		Mesh:           mesh,
		TrustedProxies: c.trustedProxies,
		ProxyProtocol:  c.proxyProtocol,
		GetCertificate: getCertificate,
		Log:            n.log,
	})
	if err != nil {
		return err
	}
	if n.listeners.stun != nil {
		if n.stun, err = stun.New(stun.Config{Conn: n.listeners.stun, Gateways: c.gateways, Log: n.log}); err != nil {
			return err
		}
	}
	n.selfCheck = n.newSelfCheck()
	n.health = healthz.New(n.checks())
	n.servers()
	return nil
}

func (n *node) servers() {
	admin := http.NewServeMux()
	admin.Handle("/", n.health.Handler())
	admin.HandleFunc("GET /derpmap", n.serveMap)
	admin.HandleFunc("GET /admit", n.serveAdmit)
	admin.HandleFunc("GET /metrics", n.serveMetrics)
	n.admin = httpserver.New(admin, n.log)
	if n.listeners.health != nil {
		n.healthOnly = httpserver.New(n.health.StatusHandler(), n.log)
	}
}

// certificates makes the manager of the configured mode; nil in mode off.
func (n *node) certificates(ctx context.Context) (certs.Manager, error) {
	c := n.config
	switch c.mode {
	case modeManual:
		manual := c.manual
		manual.Log = n.log
		m, err := certs.LoadManual(manual)
		if err != nil {
			return nil, fmt.Errorf("DERP_CERT_FILE: %w", err)
		}
		return m, nil
	case modePinned:
		pinned := c.pinned
		pinned.Log = n.log
		m, err := certs.LoadPinned(pinned)
		if errors.Is(err, fs.ErrNotExist) {
			// The certificate is made once, with every address that is
			// known by then; later starts need not wait for the answer.
			if err := n.findAddress(ctx); err != nil {
				return nil, err
			}
			pinned.Names = c.names(n.found)
			if len(pinned.Names) == 0 {
				return nil, errNoName
			}
			m, err = certs.LoadOrCreatePinned(pinned)
		}
		if err != nil {
			return nil, fmt.Errorf("DERP_CERT_DIR: %w", err)
		}
		return m, nil
	case modeLetsEncrypt:
		acme := c.acme
		acme.ListenHost, _, _ = net.SplitHostPort(c.addr)
		if c.acmeTLS {
			acme.TLSPort = port(n.listeners.https.Addr())
		}
		if c.acmeHTTP && n.listeners.http != nil {
			acme.HTTPPort = port(n.listeners.http.Addr())
		}
		acme.Log = n.log
		return certs.NewACME(acme), nil
	}
	return nil, nil
}

// errNoName prevents a certificate that no client would ever accept, and that
// would be kept for ten years all the same.
var errNoName = errors.New("DERP_DOMAIN: no address of this machine was found, and the pinned certificate must name it; set DERP_DOMAIN or DERP_PUBLIC_IPV4, or start again when the network is up")

// names are all that this node is known by: domains, and addresses given or
// found.
func (c *config) names(f host.Addresses) []string {
	list := slices.Clone(c.domains)
	for _, s := range []string{c.node.IPv4, c.node.IPv6, f.V4.String(), f.V6.String()} {
		if _, err := netip.ParseAddr(s); err == nil && !slices.Contains(list, s) {
			list = append(list, s)
		}
	}
	return list
}

// findAddress finds the public address out, once.
func (n *node) findAddress(ctx context.Context) error {
	select {
	case <-n.address:
		return nil
	default:
	}
	if n.config.needsDiscovery() {
		n.found = host.PublicAddresses(ctx, n.config.discovery)
	}
	close(n.address)
	return nil
}

// task is one long-lived part. It returns nil when its context ends.
type task struct {
	name string
	run  func(context.Context) error
}

// tasks is everything that runs, by the configuration.
func (n *node) tasks() []task {
	list := []task{
		{"https", func(context.Context) error { return n.relay.Serve(n.listeners.https) }},
		{"admin", func(context.Context) error { return served(n.admin.Serve(n.listeners.admin)) }},
		{"bootstrap-dns", n.bootstrap.Run},
		{"address", n.findAddress},
		{"self-check", n.runSelfCheck},
		{"announce", n.announce},
		{"stop", n.stop},
	}
	if n.listeners.http != nil {
		handler := relay.RedirectHandler(n.config.publicHTTPSPort(port(n.listeners.https.Addr())))
		if n.certs != nil {
			handler = n.certs.HTTPHandler(handler)
		}
		list = append(list, task{"http", func(context.Context) error { return n.relay.ServePlain(n.listeners.http, handler) }})
	}
	if n.healthOnly != nil {
		list = append(list, task{"health", func(context.Context) error { return served(n.healthOnly.Serve(n.listeners.health)) }})
	}
	if n.stun != nil {
		list = append(list, task{"stun", n.stun.Run})
	}
	if n.certs != nil {
		list = append(list, task{"certificates", n.certs.Run})
	}
	if n.gate != nil {
		list = append(list, task{"clients", n.relay.Run}, task{"admission", func(ctx context.Context) error {
			return n.gate.Run(ctx, admit.Clients{List: n.connected, Disconnect: n.relay.Disconnect})
		}})
	}
	if n.config.meshed() {
		list = append(list, task{"mesh", n.relay.Mesh().Run})
	}
	return list
}

// served tells the end of a server from its failure.
func served(err error) error {
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// runTasks runs all tasks until ctx ends or one of them fails.
func runTasks(ctx context.Context, tasks []task, log zerolog.Logger) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, t := range tasks {
		g.Go(func() error {
			if err := t.run(ctx); err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
			return nil
		})
	}
	err := g.Wait()
	if err == nil {
		log.Info().Msg("stopped")
	}
	return err
}

// announce waits until the relay serves, and says what was started.
func (n *node) announce(ctx context.Context) error {
	n.announceStart()
	select {
	case <-n.serving:
	case <-ctx.Done():
		return nil
	}
	n.log.Info().Int64("ready_ms", time.Since(n.start).Milliseconds()).Msg("ready")

	select {
	case <-n.address:
	case <-ctx.Done():
		return nil
	}
	out, err := n.formatMap(ctx, "policy")
	if err != nil {
		return err
	}
	// A relay that nobody listens to is still a relay.
	if _, err := fmt.Fprintf(n.stdout, "\n%s\n", out); err != nil {
		n.log.Warn().Err(err).Msg("the map was not printed; see derpd derpmap")
	}
	return nil
}

func (n *node) announceStart() {
	c := n.config
	e := n.log.Info().Str("version", version).Str("upstream", upstreamVersion()).
		Stringer("https", n.listeners.https.Addr()).Stringer("admin", n.listeners.admin.Addr()).
		Str("certificates", c.mode).Str("node_key", n.relay.PublicKey().String())
	if n.listeners.http != nil {
		e = e.Stringer("http", n.listeners.http.Addr())
	}
	if n.listeners.stun != nil {
		e = e.Stringer("stun", n.listeners.stun.LocalAddr())
	}
	if n.listeners.health != nil {
		e = e.Stringer("health", n.listeners.health.Addr())
	}
	e.Msg("listening")
	if c.loaded.platform != nil {
		n.log.Info().Str("platform", c.loaded.platform.name).Strs("assumed", c.loaded.assumed).Msg("platform found; derpd env shows what it decides")
	}
	for _, w := range c.warnings {
		n.log.Warn().Str("warning", w).Msg("configuration")
	}
	if warning := host.OpenFilesWarning(); warning != "" {
		n.log.Warn().Str("warning", warning).Msg("limit of the host")
	}
	if host.LostWithContainer(c.dataDir) {
		n.log.Warn().Str("dir", c.dataDir).Msg("the data directory is no volume: node key and certificates are lost with this container")
	}
	switch {
	case n.gate != nil:
		n.log.Info().Strs("sources", n.gate.Sources()).Msg("only admitted nodes may use this relay")
	case c.openOnOrder:
		n.log.Warn().Msg("this relay is open, as DERP_VERIFY_CLIENTS=false says: anybody who finds it can use it")
	default:
		n.log.Warn().Msg("this relay is open: anybody who finds it can use it; " + toClose)
	}
}

// stop waits for the end of ctx, and then takes the relay down in the order in
// which clients should notice: health first, then STUN, then the relay.
func (n *node) stop(ctx context.Context) error {
	<-ctx.Done()
	n.log.Info().Msg("stopping")
	n.health.Stopping()
	if n.stun != nil {
		n.stun.SetOpen(false)
	}
	closed := make(chan struct{})
	go func() {
		_ = n.relay.Close()
		close(closed)
	}()
	timeout := time.NewTimer(stopTimeout)
	defer timeout.Stop()
	select {
	case <-closed:
	case <-timeout.C:
		n.log.Warn().Msg("some clients were still connected when the relay stopped")
	}
	_ = n.admin.Close()
	if n.healthOnly != nil {
		_ = n.healthOnly.Close()
	}
	n.listeners.close()
	return nil
}

// serveMap answers `derpd derpmap`.
func (n *node) serveMap(w http.ResponseWriter, r *http.Request) {
	select {
	case <-n.address:
	case <-r.Context().Done():
		return
	}
	out, err := n.formatMap(r.Context(), r.FormValue("format"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", mapType)
	_, _ = w.Write(out)
}

// formatMap describes the region as it runs. The address must be known.
func (n *node) formatMap(ctx context.Context, format string) ([]byte, error) {
	nodes, notes := n.region(ctx)
	return derpmap.Format(format, derpmap.New(nodes...), notes)
}

// public describes the relay as it runs. The address must be known.
func (n *node) public() (derpmap.Node, []string) {
	at := ports{https: port(n.listeners.https.Addr())}
	if n.listeners.http != nil {
		at.http = port(n.listeners.http.Addr())
	}
	if n.listeners.stun != nil {
		at.stun = port(n.listeners.stun.LocalAddr())
	}
	pin := ""
	if n.certs != nil {
		pin = n.certs.Status().Pin
	}
	return publicNode(n.config, at, pin, n.found)
}
