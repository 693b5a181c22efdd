package config

import (
	"net/netip"
	"regexp"
	"strconv"

	"derpd/relay/derpmap"
)

// RegionEnv is this node in the DERP map.
type RegionEnv struct {
	RegionID       string `envconfig:"DERP_REGION_ID" default:"900" desc:"region in the map, 900 to 999" zh:"DERPMap 里的区域编号，900 到 999"`
	RegionCode     string `envconfig:"DERP_REGION_CODE" default:"derpd" desc:"short name of the region" zh:"区域短名"`
	RegionName     string `envconfig:"DERP_REGION_NAME" default:"derpd" desc:"name of the region for people" zh:"给人看的区域名"`
	NodeName       string `envconfig:"DERP_NODE_NAME" desc:"name of the node, unique in the whole map" zh:"节点名，在整个 DERPMap 里唯一" or:"DERP_REGION_ID and the letter a" zhor:"DERP_REGION_ID 加字母 a"`
	PublicIPv4     string `envconfig:"DERP_PUBLIC_IPV4" desc:"IPv4 address that clients dial; none if there is none" zh:"客户端连接的 IPv4 地址；没有就写 none" or:"found, without DERP_DOMAIN; else DNS" zhor:"没有 DERP_DOMAIN 时自动查找，否则用 DNS"`
	PublicIPv6     string `envconfig:"DERP_PUBLIC_IPV6" desc:"IPv6 address that clients dial; none if there is none" zh:"客户端连接的 IPv6 地址；没有就写 none" or:"found, without DERP_DOMAIN; else DNS" zhor:"没有 DERP_DOMAIN 时自动查找，否则用 DNS"`
	PublicPort     string `envconfig:"DERP_PUBLIC_PORT" desc:"HTTPS port that clients dial, where it differs" zh:"客户端连接的 HTTPS 端口（与监听端口不同时）" or:"as listened; 443 when DERP_CERT_MODE is off" zhor:"同监听端口；DERP_CERT_MODE 为 off 时是 443"`
	PublicHTTPPort string `envconfig:"DERP_PUBLIC_HTTP_PORT" desc:"plain HTTP port as seen from outside, where it differs" zh:"从外面看到的明文 HTTP 端口（与监听端口不同时）" or:"as listened" zhor:"同监听端口"`
	PublicSTUNPort string `envconfig:"DERP_PUBLIC_STUN_PORT" desc:"STUN port that clients ask, where it differs; -1 to say there is none" zh:"客户端使用的 STUN 端口（与监听端口不同时）；-1 表示没有" or:"as listened" zhor:"同监听端口"`
	Discovery      string `envconfig:"DERP_DISCOVERY" default:"stun" desc:"how the public address is found without DERP_DOMAIN: stun asks Tailscale's public STUN servers once, HOST:PORT,… asks others, off takes the address of the outbound interface" zh:"没有 DERP_DOMAIN 时如何得知公网地址：stun 启动时询问一次 Tailscale 的公共 STUN 服务器，HOST:PORT,… 询问别的服务器，off 取出口网卡的地址"`
}

// Region is this node in the DERP map.
type Region struct {
	// Node has what is known before listening: names and configured addresses.
	Node derpmap.Node

	// Ports that clients use, where they differ from those of the listeners;
	// else 0. STUNPort is -1 if the map says that there is no STUN.
	HTTPSPort, HTTPPort, STUNPort int

	Discovery []string // STUN servers that find the public address
}

// publicSTUNServers are Tailscale's, far apart, so that one of them is near
// enough to answer in time.
var publicSTUNServers = []string{"derp1.tailscale.com:3478", "derp3.tailscale.com:3478", "derp4.tailscale.com:3478", "derp7.tailscale.com:3478"}

var identifier = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]*$`)

// parseRegion parses the node's entry in the map. named reports
// whether DERP_DOMAIN is set.
func parseRegion(p *problems, env RegionEnv, named bool, mode string) Region {
	id, err := strconv.Atoi(env.RegionID)
	if err != nil || id < 900 || id > 999 {
		p.add("DERP_REGION_ID", "want a number from 900 to 999 (the others are Tailscale's), got %q", env.RegionID)
	}
	r := Region{
		Node: derpmap.Node{
			RegionID:   id,
			RegionCode: parseIdentifier(p, "DERP_REGION_CODE", env.RegionCode),
			RegionName: env.RegionName,
			Name:       derpmap.DefaultNodeName(id),
			IPv4:       parsePublicAddress(p, "DERP_PUBLIC_IPV4", "IPv4", env.PublicIPv4, netip.Addr.Is4),
			IPv6:       parsePublicAddress(p, "DERP_PUBLIC_IPV6", "IPv6", env.PublicIPv6, netip.Addr.Is6),
		},
		Discovery: parseDiscovery(p, env.Discovery),
	}
	if env.NodeName != "" {
		r.Node.Name = parseIdentifier(p, "DERP_NODE_NAME", env.NodeName)
	}
	if r.Node.IPv4 == derpmap.None && r.Node.IPv6 == derpmap.None && !named {
		p.add("DERP_PUBLIC_IPV4", "is none, and so is DERP_PUBLIC_IPV6, so that clients have nothing to dial; set one of the two to an address, or set DERP_DOMAIN")
	}
	if env.PublicPort != "" {
		r.HTTPSPort, _ = p.port("DERP_PUBLIC_PORT", env.PublicPort, 1)
	} else if mode == ModeOff {
		r.HTTPSPort = 443
	}
	if env.PublicHTTPPort != "" {
		r.HTTPPort, _ = p.port("DERP_PUBLIC_HTTP_PORT", env.PublicHTTPPort, 1)
	}
	if env.PublicSTUNPort != "" {
		r.STUNPort, _ = p.port("DERP_PUBLIC_STUN_PORT", env.PublicSTUNPort, -1)
	}
	return r
}

func parseIdentifier(p *problems, name, value string) string {
	if !identifier.MatchString(value) {
		p.add(name, "want letters, digits, dots, underscores and hyphens, got %q", value)
	}
	return value
}

func parsePublicAddress(p *problems, name, family, value string, is func(netip.Addr) bool) string {
	if value == "" || value == derpmap.None {
		return value
	}
	addr, err := netip.ParseAddr(value)
	if err != nil || !is(addr) || addr.Is4In6() || addr.IsUnspecified() || addr.Zone() != "" {
		p.add(name, "want an %s address or none, got %q", family, value)
		return ""
	}
	return addr.String()
}

func parseDiscovery(p *problems, value string) []string {
	switch value {
	case "stun":
		return publicSTUNServers
	case "off":
		return nil
	}
	servers := p.list("DERP_DISCOVERY", value)
	for _, server := range servers {
		if !isServer(server) {
			p.add("DERP_DISCOVERY", "want stun, off or STUN servers as HOST:PORT, got %q", server)
		}
	}
	return servers
}
