package certs

import (
	"github.com/caddyserver/certmagic"
	"github.com/libdns/tencentcloud"
)

func init() {
	registerDNS(DNSProvider{Name: "tencentcloud", Variables: func() DNSVariables { return new(TencentCloud) }})
}

// TencentCloud are the variables of DERP_DNS_PROVIDER=tencentcloud.
type TencentCloud struct {
	SecretID     string `envconfig:"DERP_DNS_TENCENTCLOUD_SECRET_ID" desc:"SecretId of a CAM user with QcloudDNSPodFullAccess" zh:"CAM 子用户的 SecretId，需要 QcloudDNSPodFullAccess 权限"`
	SecretKey    string `envconfig:"DERP_DNS_TENCENTCLOUD_SECRET_KEY" secret:"true" desc:"SecretKey" zh:"SecretKey"`
	SessionToken string `envconfig:"DERP_DNS_TENCENTCLOUD_SESSION_TOKEN" secret:"true" optional:"true" desc:"session token, for temporary credentials" zh:"session token，仅用于临时凭证"`
}

func (v *TencentCloud) provider() certmagic.DNSProvider {
	return &tencentcloud.Provider{SecretId: v.SecretID, SecretKey: v.SecretKey, SessionToken: v.SessionToken}
}
