package node

import (
	"context"
	"expvar"
	"fmt"
	"strings"

	"golang.org/x/sync/errgroup"
	"tailscale.com/types/key"

	"derpd/cmd/derpd/internal/nodelimits"
	"derpd/healthz"
	"derpd/relay"
	"derpd/relay/admit"
)

// newNodeLimits reads the limits of nodes.
func (n *Node) newNodeLimits() (*nodelimits.Limits, error) {
	l, err := nodelimits.New(nodelimits.Config{
		Defaults: n.config.NodeLimits.Defaults,
		Path:     n.config.NodeLimits.File,
		Describe: n.describeNode,
		Changed: func() {
			n.relay.ApplyNodeLimits()
			n.health.Changed()
		},
		Log: n.log,
	})
	if err != nil {
		return nil, fmt.Errorf("DERP_LIMITS_FILE: %w", err)
	}
	return l, nil
}

// describeNode returns what the sources of admission say about a node.
func (n *Node) describeNode(node key.NodePublic) admit.Description {
	if gate := n.gate.Load(); gate != nil {
		return gate.Describe(node)
	}
	return admit.Description{}
}

// nodeLimit returns the limit of a node. The self-check has none.
func (n *Node) nodeLimit(node key.NodePublic) relay.NodeLimit {
	if n.probe.has(node) {
		return relay.NodeLimit{}
	}
	limit, _ := n.nodeLimits.Of(node)
	return limit
}

// runNodeLimits keeps the limits current until ctx ends.
func (n *Node) runNodeLimits(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return n.relay.RunNodeLimits(ctx) })
	if n.config.NodeLimits.File != "" {
		group.Go(func() error { return n.nodeLimits.Run(ctx) })
	}
	return group.Wait()
}

// explainLimit describes the limit of a node for `derpd admit`.
func (n *Node) explainLimit(node key.NodePublic) string {
	text := n.nodeLimits.Explain(node)
	switch connections, slowed := n.relay.Connections(node); {
	case slowed:
		text += fmt.Sprintf("; connections now: %d, slowed down", connections)
	case connections > 0:
		text += fmt.Sprintf("; connections now: %d", connections)
	}
	return text
}

func (n *Node) checkNodeLimits(context.Context) healthz.Result {
	line := "each node: " + nodelimits.Describe(n.config.NodeLimits.Defaults)
	if n.config.NodeLimits.File != "" {
		line += fmt.Sprintf("; lines of %s: %d", n.config.NodeLimits.File, n.nodeLimits.Lines())
	}
	now := n.relay.LimitedNodes()
	line += fmt.Sprintf("; connected nodes with a rate: %d, slowed down: %d", now.Nodes, now.Slowed)
	if err := n.nodeLimits.Problem(); err != nil {
		return healthz.Warnf("%s; %s", line, strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return healthz.Okf("%s", line)
}

func (n *Node) nodeLimitMetrics() []expvar.KeyValue {
	now := n.relay.LimitedNodes()
	list := []expvar.KeyValue{{Key: "counter_derpd_connections_replaced_total", Value: number(now.Replaced)}}
	if !n.config.NodeLimits.May() {
		return list
	}
	waited := new(expvar.Float)
	waited.Set(now.Waited.Seconds())
	list = append(list,
		expvar.KeyValue{Key: "gauge_derpd_limited_nodes", Value: number(now.Nodes)},
		expvar.KeyValue{Key: "gauge_derpd_slowed_nodes", Value: number(now.Slowed)},
		expvar.KeyValue{Key: "counter_derpd_rate_waits_total", Value: number(now.Waits)},
		expvar.KeyValue{Key: "counter_derpd_rate_waited_seconds_total", Value: waited})
	if n.config.NodeLimits.File != "" {
		list = append(list,
			expvar.KeyValue{Key: "gauge_derpd_limits_lines", Value: number(n.nodeLimits.Lines())},
			expvar.KeyValue{Key: "counter_derpd_limits_read_errors_total", Value: number(n.nodeLimits.Failures())})
	}
	return list
}
