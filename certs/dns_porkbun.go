package certs

import (
	"github.com/caddyserver/certmagic"
	"github.com/libdns/porkbun"
)

func init() {
	registerDNS(DNSProvider{Name: "porkbun", Variables: func() DNSVariables { return new(Porkbun) }})
}

// Porkbun are the variables of DERP_DNS_PROVIDER=porkbun.
type Porkbun struct {
	APIKey       string `envconfig:"DERP_DNS_PORKBUN_API_KEY" secret:"true" desc:"API key; API access must be on for the domain" zh:"API key；该域名要打开 API 访问"`
	APISecretKey string `envconfig:"DERP_DNS_PORKBUN_API_SECRET_KEY" secret:"true" desc:"secret API key" zh:"secret API key"`
}

func (v *Porkbun) provider() certmagic.DNSProvider {
	return &porkbun.Provider{APIKey: v.APIKey, APISecretKey: v.APISecretKey}
}
