package certs

import (
	"github.com/caddyserver/certmagic"
	"github.com/libdns/rfc2136"
)

func init() {
	registerDNS(DNSProvider{Name: "rfc2136", Variables: func() DNSVariables { return new(RFC2136) }})
}

// RFC2136 are the variables of DERP_DNS_PROVIDER=rfc2136.
type RFC2136 struct {
	Server  string `envconfig:"DERP_DNS_RFC2136_SERVER" is:"hostport" desc:"the zone's primary server (BIND, Knot, PowerDNS and others), HOST:PORT, TCP" zh:"该区域的主服务器（BIND、Knot、PowerDNS 等），HOST:PORT，TCP"`
	KeyName string `envconfig:"DERP_DNS_RFC2136_KEY_NAME" desc:"name of the TSIG key" zh:"TSIG 密钥的名称"`
	KeyAlg  string `envconfig:"DERP_DNS_RFC2136_KEY_ALG" default:"hmac-sha256" options:"hmac-sha1,hmac-sha224,hmac-sha256,hmac-sha384,hmac-sha512" desc:"algorithm of the TSIG key" zh:"TSIG 密钥的算法"`
	Key     string `envconfig:"DERP_DNS_RFC2136_KEY" secret:"true" is:"base64" desc:"the TSIG key, base64" zh:"TSIG 密钥，base64"`
}

func (v *RFC2136) provider() certmagic.DNSProvider {
	return &rfc2136.Provider{Server: v.Server, KeyName: v.KeyName, KeyAlg: v.KeyAlg, Key: v.Key}
}
