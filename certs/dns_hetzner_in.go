//go:build hetzner

package certs

import (
	"github.com/caddyserver/certmagic"
	hetzner "github.com/libdns/hetzner/v2"
)

func (v *Hetzner) provider() certmagic.DNSProvider {
	return &hetzner.Provider{APIToken: v.APIToken}
}
