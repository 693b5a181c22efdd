package certs

import (
	"github.com/caddyserver/certmagic"
	"github.com/libdns/gandi"
)

func init() {
	registerDNS(DNSProvider{Name: "gandi", Variables: func() DNSVariables { return new(Gandi) }})
}

// Gandi are the variables of DERP_DNS_PROVIDER=gandi.
type Gandi struct {
	APIToken string `envconfig:"DERP_DNS_GANDI_API_TOKEN" secret:"true" desc:"personal access token" zh:"个人访问令牌"`
}

func (v *Gandi) provider() certmagic.DNSProvider {
	return &gandi.Provider{BearerToken: v.APIToken}
}
