package certs

import (
	"github.com/caddyserver/certmagic"
	"github.com/libdns/cloudflare"
)

func init() {
	registerDNS(DNSProvider{Name: "cloudflare", Variables: func() DNSVariables { return new(Cloudflare) }})
}

// Cloudflare are the variables of DERP_DNS_PROVIDER=cloudflare.
type Cloudflare struct {
	APIToken  string `envconfig:"DERP_DNS_CLOUDFLARE_API_TOKEN" secret:"true" desc:"API token (not the global key) that may edit the zone's DNS" zh:"有权编辑该区域 DNS 的 API 令牌（不是 Global API Key）"`
	ZoneToken string `envconfig:"DERP_DNS_CLOUDFLARE_ZONE_TOKEN" secret:"true" optional:"true" desc:"API token that may read zones, if the first may not" zh:"有权读取区域的 API 令牌，在前一个令牌无此权限时使用"`
}

func (v *Cloudflare) provider() certmagic.DNSProvider {
	return &cloudflare.Provider{APIToken: v.APIToken, ZoneToken: v.ZoneToken}
}
