package certs

import (
	"github.com/caddyserver/certmagic"
	"github.com/libdns/godaddy"
)

func init() {
	registerDNS(DNSProvider{Name: "godaddy", Variables: func() DNSVariables { return new(GoDaddy) }})
}

// GoDaddy are the variables of DERP_DNS_PROVIDER=godaddy.
type GoDaddy struct {
	APIKey    string `envconfig:"DERP_DNS_GODADDY_API_KEY" desc:"API key" zh:"API key"`
	APISecret string `envconfig:"DERP_DNS_GODADDY_API_SECRET" secret:"true" desc:"API secret" zh:"API secret"`
}

func (v *GoDaddy) provider() certmagic.DNSProvider {
	return &godaddy.Provider{APIToken: v.APIKey + ":" + v.APISecret}
}
