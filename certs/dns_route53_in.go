//go:build route53

package certs

import (
	"github.com/caddyserver/certmagic"
	"github.com/libdns/route53"
)

func (v *Route53) provider() certmagic.DNSProvider {
	return &route53.Provider{
		AccessKeyId: v.AccessKeyID, SecretAccessKey: v.SecretAccessKey, SessionToken: v.SessionToken,
		Region: v.Region, HostedZoneID: v.HostedZoneID,
	}
}
