package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"

	"derpd/cmd/derpd/internal/config"
	"derpd/cmd/derpd/internal/host"
)

// stopTimeout bounds the stop. A container manager starts the next relay only
// after this one has exited.
const stopTimeout = 800 * time.Millisecond

// task is one long-lived part. It returns nil when its context ends.
type task struct {
	name string
	run  func(context.Context) error
}

// tasks are all parts that run with this configuration.
func (n *Node) tasks() []task {
	list := []task{
		{"https", func(context.Context) error { return n.relay.Serve(n.listeners.https) }},
		{"admin", func(context.Context) error { return served(n.admin.Serve(n.listeners.admin)) }},
		{"bootstrap-dns", n.bootstrap.Run},
		{"address", func(ctx context.Context) error { n.findAddress(ctx); return nil }},
		{"self-check", n.runSelfCheck},
		{"announce", n.announce},
		{"packets", n.packets.run},
		{"connections", n.watchConnections},
		{"notices", n.runNotices},
		{"stop", n.stop},
	}
	if n.listeners.http != nil {
		list = append(list, task{"http", func(context.Context) error { return n.relay.ServePlain(n.listeners.http, n.plain) }})
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
	if gate := n.gate.Load(); gate != nil {
		list = append(list, task{"clients", n.relay.Run}, task{"admission", func(ctx context.Context) error { return n.runGate(ctx, gate) }})
	} else if n.mayClose() {
		list = append(list, task{"admission", n.closeWithSocket})
	}
	if n.config.NodeLimits.May() {
		list = append(list, task{"limits", n.runNodeLimits})
	}
	if n.config.Meshed() {
		list = append(list, task{"mesh", n.relay.Mesh().Run})
	}
	if n.updates != nil {
		list = append(list, task{"updates", n.updates.run})
	}
	return list
}

// repeat calls do at once and at each interval, until ctx ends. It returns nil.
func repeat(ctx context.Context, interval time.Duration, do func()) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		do()
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// served returns nil for a server that was closed.
func served(err error) error {
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Run runs the node until ctx ends or a part of it fails.
func (n *Node) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, t := range n.tasks() {
		g.Go(func() error {
			if err := t.run(ctx); err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
			return nil
		})
	}
	err := g.Wait()
	if err == nil {
		n.log.Info().Msg("stopped")
	}
	return err
}

// findAddress finds the public address, once.
func (n *Node) findAddress(ctx context.Context) {
	select {
	case <-n.address:
	default:
		n.found = publicAddresses(ctx, n.config)
		close(n.address)
	}
}

// announce logs what was started, waits until the relay serves, and prints the
// map. It prints the map again when clients need a new one.
func (n *Node) announce(ctx context.Context) error {
	n.logStart()
	select {
	case <-n.serving:
	case <-ctx.Done():
		return nil
	}
	n.log.Info().Int64("ready_ms", time.Since(n.options.Start).Milliseconds()).Msg("ready")
	for {
		if err := n.printMap(ctx); err != nil {
			return err
		}
		select {
		case <-n.mapCert.changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// printMap prints the map as at the start.
func (n *Node) printMap(ctx context.Context) error {
	out, err := n.formatMap(ctx, "policy")
	switch {
	case ctx.Err() != nil:
		return nil
	case err != nil:
		return err
	}
	// The relay works without a reader of its map.
	if _, err := fmt.Fprintf(n.options.Map, "\n%s\n", out); err != nil {
		n.log.Warn().Err(err).Msg("the map could not be printed; `derpd derpmap` prints it")
	}
	return nil
}

func (n *Node) logStart() {
	c := n.config
	e := n.log.Info().Str("version", n.options.Build.Version).Str("upstream", n.options.Build.Upstream).
		Stringer("https", n.listeners.https.Addr()).Stringer("admin", n.listeners.admin.Addr()).
		Str("certificates", c.Certificate.Mode).Str("node_key", n.relay.PublicKey().String())
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
	n.log.Info().Int("connections", c.Limits.Connections).Int("strangers", c.Limits.Strangers).Int("per_address", c.Limits.PerAddress).
		Int("accept_rate", c.Limits.AcceptRate).Msg("limits of connections, 0 is no limit; derpd env prints the variables")
	if c.Platform.Name != "" {
		n.log.Info().Str("platform", c.Platform.Name).Strs("assumed", c.Platform.Assumed).Msg("platform found; derpd env prints the defaults it sets")
	}
	for _, w := range c.Warnings {
		n.log.Warn().Str("warning", w).Msg("configuration")
	}
	for _, w := range n.config.Exposed() {
		n.log.Warn().Str("warning", w).Msg("private file")
	}
	if warning := host.OpenFilesWarning(); warning != "" {
		n.log.Warn().Str("warning", warning).Msg("limit of the host")
	}
	if host.LostWithContainer(c.Storage.DataDir) {
		n.log.Warn().Str("dir", c.Storage.DataDir).Msg("the data directory is not a volume: node key and certificates are lost with this container; mount a volume there")
	}
	switch gate := n.gate.Load(); {
	case gate != nil:
		n.log.Info().Strs("sources", gate.Sources()).Msg("only admitted nodes may use this relay")
	case c.Admission.OpenOnOrder:
		n.log.Warn().Msg("this relay is open, because DERP_VERIFY_CLIENTS is false: anybody who finds it can use it")
	default:
		n.log.Warn().Str("fix", config.HowToClose()).Msg("this relay is open: anybody who finds it can use it")
	}
}

// stop waits for the end of ctx, and then closes the relay in the order in which
// clients should notice: health, STUN, relay.
func (n *Node) stop(ctx context.Context) error {
	<-ctx.Done()
	n.log.Info().Msg("stopping")
	n.health.Stopping()
	if n.stun != nil {
		n.stun.SetOpen(false)
	}
	closed := make(chan struct{})
	go func() {
		n.noticeStop()
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
