//go:build hetzner

package certs

import (
	"github.com/caddyserver/certmagic"
	hetzner "github.com/libdns/hetzner/v2"
)

func newHetzner(v map[string]string) certmagic.DNSProvider {
	return &hetzner.Provider{APIToken: v["API_TOKEN"]}
}
