package node

import (
	"context"
	"expvar"
	"fmt"
	"net/netip"
	"time"

	"tailscale.com/metrics"

	"derpd/healthz"
	"derpd/relay"
)

const (
	limitsWatched = time.Second // between two looks at the counters

	// limitedFor is the time for which a limit is reported after it has closed a
	// connection.
	limitedFor = 2 * time.Minute
)

// limitVariable is the variable that raises a limit.
var limitVariable = map[relay.Limit]string{
	relay.LimitConnections: "DERP_MAX_CONNECTIONS",
	relay.LimitStrangers:   "DERP_MAX_STRANGERS",
	relay.LimitPerAddress:  "DERP_MAX_PER_ADDRESS",
	relay.LimitAcceptRate:  "DERP_ACCEPT_RATE",
}

// limitMeaning is what a limit does to clients while it closes connections.
var limitMeaning = map[relay.Limit]string{
	relay.LimitConnections: "the relay is full; a new client is refused, or closes a connection without an admitted node",
	relay.LimitStrangers:   "many connections have no admitted node, and the oldest ones make room for new clients",
	relay.LimitPerAddress:  "one address has too many connections; a proxy in front must send the addresses of its clients, see DERP_TRUSTED_PROXIES",
	relay.LimitAcceptRate:  "one address connects too often; a proxy in front must send the addresses of its clients, see DERP_TRUSTED_PROXIES",
}

// connectionLimits are the limits of the configuration. Clients come from the gateway of a
// container's network, where that hides their addresses.
func (n *Node) connectionLimits() relay.Limits {
	l := n.config.Limits
	for _, gateway := range n.options.Gateways {
		l.Shared = append(l.Shared, netip.PrefixFrom(gateway, gateway.BitLen()))
	}
	return l
}

// limitOf is the configured value of a limit.
func (n *Node) limitOf(limit relay.Limit) int {
	l := n.config.Limits
	return map[relay.Limit]int{
		relay.LimitConnections: l.Connections,
		relay.LimitStrangers:   l.Strangers,
		relay.LimitPerAddress:  l.PerAddress,
		relay.LimitAcceptRate:  l.AcceptRate,
	}[limit]
}

// watchConnections logs when a limit begins and when it ceases to close connections, until
// ctx ends.
func (n *Node) watchConnections(ctx context.Context) error {
	closing := make(map[relay.Limit]bool)
	return repeat(ctx, limitsWatched, func() { n.logLimits(closing, n.relay.Places().Limited) })
}

// logLimits logs the limits that differ from closing, and updates it.
func (n *Node) logLimits(closing map[relay.Limit]bool, limited []relay.LimitCount) {
	for _, l := range limited {
		if l.Within(limitedFor) == closing[l.Limit] {
			continue
		}
		closing[l.Limit] = !closing[l.Limit]
		if closing[l.Limit] {
			n.log.Warn().Str("variable", limitVariable[l.Limit]).Int("limit", n.limitOf(l.Limit)).Str("meaning", limitMeaning[l.Limit]).
				Msg("a limit closes connections; connected clients are not affected")
		} else {
			n.log.Info().Str("variable", limitVariable[l.Limit]).Uint64("closed_since_start", l.Count).Msg("the limit closes no more connections")
		}
		n.health.Changed()
	}
}

// checkConnections never fails: strangers could otherwise make the relay refuse its clients.
func (n *Node) checkConnections(context.Context) healthz.Result {
	places := n.relay.Places()
	line := fmt.Sprintf("%d open, %d of them without an admitted node", places.Open, places.Waiting)
	limited := false
	for _, l := range places.Limited {
		if l.Within(limitedFor) {
			limited = true
			line += fmt.Sprintf("; %s=%d has closed %d connections, the last one %s ago: %s",
				limitVariable[l.Limit], n.limitOf(l.Limit), l.Count, age(l.Last), limitMeaning[l.Limit])
		}
	}
	if limited {
		return healthz.Warnf("%s; connected clients are not affected", line)
	}
	return healthz.Okf("%s", line)
}

func (n *Node) connectionMetrics() []expvar.KeyValue {
	places := n.relay.Places()
	closed := &metrics.MultiLabelMap[limitLabel]{Type: "counter", Help: "Connections closed at a limit since the start, to the HTTPS and HTTP listeners."}
	values := &metrics.MultiLabelMap[limitLabel]{Type: "gauge", Help: "Limits of connections. 0 is no limit."}
	for _, l := range places.Limited {
		closed.Set(limitLabel{string(l.Limit)}, number(int64(l.Count)))
		values.Set(limitLabel{string(l.Limit)}, number(n.limitOf(l.Limit)))
	}
	return []expvar.KeyValue{
		{Key: "derpd_connections_closed_total", Value: closed},
		{Key: "derpd_connections_limit", Value: values},
		{Key: "gauge_derpd_connections", Value: number(places.Open)},
		{Key: "gauge_derpd_connections_waiting", Value: number(places.Waiting)},
	}
}
