//go:build route53

package certs

import (
	"github.com/caddyserver/certmagic"
	"github.com/libdns/route53"
)

func newRoute53(v map[string]string) certmagic.DNSProvider {
	return &route53.Provider{
		AccessKeyId: v["ACCESS_KEY_ID"], SecretAccessKey: v["SECRET_ACCESS_KEY"], SessionToken: v["SESSION_TOKEN"],
		Region: v["REGION"], HostedZoneID: v["HOSTED_ZONE_ID"],
	}
}
