//go:build !hetzner

package certs

import "github.com/caddyserver/certmagic"

func (*Hetzner) provider() certmagic.DNSProvider { return nil }
