package config

import (
	"net/netip"
)

// ProxiesEnv are the proxies in front of derpd.
type ProxiesEnv struct {
	TrustedProxies string `envconfig:"DERP_TRUSTED_PROXIES" desc:"addresses or networks of the proxies in front of derpd, comma-separated. They name the client in X-Forwarded-For, or with DERP_PROXY_PROTOCOL in a PROXY header instead. Never list a proxy that forwards headers of its clients unchanged" zh:"derpd 前面的代理的地址或网段，逗号分隔；它们用 X-Forwarded-For 说明客户端是谁，设置了 DERP_PROXY_PROTOCOL 时改用 PROXY 头；不要写会原样转发客户端所带请求头的代理" or:"none" zhor:"无"`
	ProxyProtocol  string `envconfig:"DERP_PROXY_PROTOCOL" default:"false" desc:"whether connections of DERP_TRUSTED_PROXIES to the HTTPS and HTTP listeners may begin with a header of HAProxy's PROXY protocol, version 1 or 2; other connections that do are closed" zh:"来自 DERP_TRUSTED_PROXIES、到 HTTPS 和 HTTP 端口的连接是否可以以 HAProxy PROXY 协议（第 1 或第 2 版）的头开始；来自别处却带这种头的连接会被关闭"`
}

// Proxies are the proxies that are trusted to name a client's address.
type Proxies struct {
	Trusted []netip.Prefix

	// ProxyProtocol is true if the proxies send PROXY headers, in place of
	// X-Forwarded-For.
	ProxyProtocol bool
}

// parseProxies returns the proxies, and a warning if clients may be able to forge
// their address.
func parseProxies(p *problems, env ProxiesEnv, mode string) (Proxies, []string) {
	var c Proxies
	for _, value := range p.list("DERP_TRUSTED_PROXIES", env.TrustedProxies) {
		network, err := netip.ParsePrefix(value)
		if addr, addrErr := netip.ParseAddr(value); addrErr == nil && addr.Zone() == "" {
			network, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		switch {
		case err != nil || network.Addr().Is4In6():
			p.add("DERP_TRUSTED_PROXIES", "want addresses or networks such as 10.0.0.5 or 10.0.0.0/24, comma-separated, got %q", value)
		case network.Bits() == 0:
			p.add("DERP_TRUSTED_PROXIES", "%s is every address, so that anybody could forge a client's address; list the addresses of your proxies", value)
		case network != network.Masked():
			p.add("DERP_TRUSTED_PROXIES", "want an address without a mask, or the network %s, got %q", network.Masked(), value)
		default:
			c.Trusted = append(c.Trusted, network)
		}
	}
	c.ProxyProtocol = p.boolean("DERP_PROXY_PROTOCOL", env.ProxyProtocol)
	isSet := env.TrustedProxies != "" || p.has("DERP_TRUSTED_PROXIES")
	switch {
	case c.ProxyProtocol && !isSet:
		p.add("DERP_PROXY_PROTOCOL", "is only used with DERP_TRUSTED_PROXIES, but that is not set; set that to the addresses of your proxies, or remove this")
	case !c.ProxyProtocol && isSet && mode != ModeOff:
		return c, []string{"DERP_TRUSTED_PROXIES without DERP_PROXY_PROTOCOL is for proxies that terminate TLS and set X-Forwarded-For; through a proxy that forwards TLS, clients can forge their address"}
	}
	return c, nil
}
