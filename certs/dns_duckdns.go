package certs

import (
	"github.com/caddyserver/certmagic"
	"github.com/libdns/duckdns"
)

func init() {
	registerDNS(DNSProvider{Name: "duckdns", Variables: func() DNSVariables { return new(DuckDNS) }})
}

// DuckDNS are the variables of DERP_DNS_PROVIDER=duckdns.
type DuckDNS struct {
	APIToken string `envconfig:"DERP_DNS_DUCKDNS_API_TOKEN" secret:"true" desc:"token of the account" zh:"账户的 token"`
}

func (v *DuckDNS) provider() certmagic.DNSProvider {
	return &duckdns.Provider{APIToken: v.APIToken}
}
