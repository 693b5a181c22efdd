package certs

import (
	"github.com/caddyserver/certmagic"
	"github.com/libdns/alidns"
)

func init() {
	registerDNS(DNSProvider{Name: "alidns", Variables: func() DNSVariables { return new(AliDNS) }})
}

// AliDNS are the variables of DERP_DNS_PROVIDER=alidns.
type AliDNS struct {
	AccessKeyID     string `envconfig:"DERP_DNS_ALIDNS_ACCESS_KEY_ID" desc:"AccessKey ID of a RAM user with AliyunDNSFullAccess" zh:"RAM 用户的 AccessKey ID，需要 AliyunDNSFullAccess 权限"`
	AccessKeySecret string `envconfig:"DERP_DNS_ALIDNS_ACCESS_KEY_SECRET" secret:"true" desc:"AccessKey secret" zh:"AccessKey Secret"`
	SecurityToken   string `envconfig:"DERP_DNS_ALIDNS_SECURITY_TOKEN" secret:"true" optional:"true" desc:"STS token, for temporary credentials" zh:"STS token，仅用于临时凭证"`
}

func (v *AliDNS) provider() certmagic.DNSProvider {
	return &alidns.Provider{CredentialInfo: alidns.CredentialInfo{AccessKeyID: v.AccessKeyID, AccessKeySecret: v.AccessKeySecret, SecurityToken: v.SecurityToken}}
}
