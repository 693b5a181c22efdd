package node

import (
	"context"
	"fmt"
	"strings"

	"derpd/healthz"
	"derpd/relay"
)

// misdirectedFix returns the cause of a misdirection and its fix.
func misdirectedFix(m relay.Misdirection) string {
	switch m {
	case relay.NoUpgrade:
		return "requests of clients reach /derp without their Upgrade header, because a proxy in front drops it; " +
			"nginx needs proxy_http_version 1.1 and proxy_set_header for Upgrade and Connection (docker/proxies/ends-tls), " +
			"Nginx Proxy Manager needs \"Websockets Support\" switched on, " +
			"and behind Cloudflare the DNS record must be \"DNS only\", because its proxy passes WebSockets alone"
	case relay.TLSOnPlainPort:
		return "clients begin TLS on a port where derpd expects plain HTTP; " +
			"let the proxy end TLS, or remove DERP_CERT_MODE=off so that derpd ends it, " +
			"and check that the published port 443 leads to DERP_ADDR"
	case relay.PlainOnTLSPort:
		return "a proxy sends plain HTTP to the port where derpd expects TLS; " +
			"set DERP_CERT_MODE=off if the proxy has the certificate (docker/proxies/ends-tls), " +
			"or let the proxy pass TLS through (docker/proxies)"
	case relay.DERPOnPlainPort:
		return "a proxy sends clients to DERP_HTTP_PORT, which only redirects; " +
			"let the proxy send them to DERP_ADDR, with DERP_CERT_MODE=off if the proxy has the certificate"
	case relay.UntrustedProxyHeader:
		return "a proxy sends PROXY headers from an address that is not in DERP_TRUSTED_PROXIES, and its connections are closed; " +
			"add the address, which DERP_LOG_LEVEL=debug logs"
	case relay.UnexpectedProxyHeader:
		return "a proxy sends PROXY headers, and derpd does not expect them; " +
			"set DERP_PROXY_PROTOCOL=true and DERP_TRUSTED_PROXIES to the address of the proxy, " +
			"or switch the PROXY protocol off in the proxy"
	}
	return string(m)
}

// misdirected logs that clients begin to arrive in a way that cannot work.
func (n *Node) misdirected(m relay.Misdirection) {
	n.log.Warn().Str("reason", string(m)).Str("fix", misdirectedFix(m)).Msg("clients cannot use the relay through what is in front of it")
	n.health.Changed()
}

// checkProxies never fails: strangers could otherwise make the relay refuse its
// clients.
func (n *Node) checkProxies(context.Context) healthz.Result {
	var bad []string
	for _, s := range n.relay.Misdirected() {
		if s.Now {
			bad = append(bad, fmt.Sprintf("%s (%s, the last one %s ago)", misdirectedFix(s.Misdirection), s.Misdirection, age(s.Last)))
		}
	}
	if len(bad) > 0 {
		return healthz.Warnf("%s", strings.Join(bad, "; "))
	}
	return healthz.Okf("no sign of a proxy or port mapping in front that breaks DERP")
}
