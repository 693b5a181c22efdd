package certs

import (
	"github.com/caddyserver/certmagic"
	"github.com/libdns/namecheap"
)

func init() {
	registerDNS(DNSProvider{Name: "namecheap", Variables: func() DNSVariables { return new(Namecheap) }})
}

// Namecheap are the variables of DERP_DNS_PROVIDER=namecheap.
type Namecheap struct {
	APIUser  string `envconfig:"DERP_DNS_NAMECHEAP_API_USER" desc:"user name" zh:"用户名"`
	APIKey   string `envconfig:"DERP_DNS_NAMECHEAP_API_KEY" secret:"true" desc:"API key" zh:"API key"`
	ClientIP string `envconfig:"DERP_DNS_NAMECHEAP_CLIENT_IP" optional:"true" is:"ip" desc:"address of this machine as allowed in Namecheap's console; if empty, a public service is asked for it" zh:"本机在 Namecheap 控制台里登记的地址；不填则询问一个公共服务"`
}

func (v *Namecheap) provider() certmagic.DNSProvider {
	return &namecheap.Provider{User: v.APIUser, APIKey: v.APIKey, ClientIP: v.ClientIP}
}
