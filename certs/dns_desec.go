package certs

import (
	"github.com/caddyserver/certmagic"
	"github.com/libdns/desec"
)

func init() {
	registerDNS(DNSProvider{Name: "desec", Variables: func() DNSVariables { return new(DeSEC) }})
}

// DeSEC are the variables of DERP_DNS_PROVIDER=desec.
type DeSEC struct {
	Token string `envconfig:"DERP_DNS_DESEC_TOKEN" secret:"true" desc:"token" zh:"令牌"`
}

func (v *DeSEC) provider() certmagic.DNSProvider {
	return &desec.Provider{Token: v.Token}
}
