package certs

import (
	"github.com/caddyserver/certmagic"
	"github.com/libdns/digitalocean"
)

func init() {
	registerDNS(DNSProvider{Name: "digitalocean", Variables: func() DNSVariables { return new(DigitalOcean) }})
}

// DigitalOcean are the variables of DERP_DNS_PROVIDER=digitalocean.
type DigitalOcean struct {
	APIToken string `envconfig:"DERP_DNS_DIGITALOCEAN_API_TOKEN" secret:"true" desc:"personal access token" zh:"个人访问令牌"`
}

func (v *DigitalOcean) provider() certmagic.DNSProvider {
	return &digitalocean.Provider{APIToken: v.APIToken}
}
