package config

import (
	"net/netip"
	"slices"
	"strings"
)

// NamesEnv are the names of this node.
type NamesEnv struct {
	Domain string `envconfig:"DERP_DOMAIN" desc:"DNS names or IP addresses of this node, comma-separated; the first is the HostName in the map" zh:"本节点的域名或 IP 地址，逗号分隔；第一个是 DERPMap 里的 HostName" or:"none: a pinned certificate on the public address found" zhor:"无：在找到的公网地址上使用 pinned 证书"`
}

// parseNames returns the names and addresses in one form: lower case, without a
// final dot, without brackets.
func parseNames(p *problems, env NamesEnv) []string {
	var list []string
	for _, item := range p.list("DERP_DOMAIN", env.Domain) {
		name, ok := parseName(p, item)
		switch {
		case !ok:
		case slices.Contains(list, name):
			p.add("DERP_DOMAIN", "%q is there twice; remove one of the two", name)
		default:
			list = append(list, name)
		}
	}
	return list
}

func parseName(p *problems, s string) (string, bool) {
	if addr, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		if addr.Zone() != "" || addr.IsUnspecified() || addr.IsMulticast() {
			p.add("DERP_DOMAIN", "want an address that clients can dial, got %q", s)
			return "", false
		}
		return addr.Unmap().String(), true
	}
	switch {
	case strings.Contains(s, "://"):
		p.add("DERP_DOMAIN", "want a name without a scheme, such as derp.example.com, got %q", s)
	case strings.HasPrefix(s, "*."):
		p.add("DERP_DOMAIN", "want the one name that clients dial, not a wildcard, got %q", s)
	case strings.Contains(s, "/"):
		p.add("DERP_DOMAIN", "want a name without a path, got %q", s)
	case strings.Contains(s, ":"):
		p.add("DERP_DOMAIN", "want a name without a port, got %q; the port goes into DERP_ADDR, or DERP_PUBLIC_PORT behind a port mapping", s)
	case len(s) > 253 || !isHostName(s) || incompleteAddress.MatchString(s):
		p.add("DERP_DOMAIN", "want DNS names (letters, digits, hyphens and dots; punycode for others) or addresses, got %q", s)
	default:
		return strings.ToLower(strings.TrimSuffix(s, ".")), true
	}
	return "", false
}
