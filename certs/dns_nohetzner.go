//go:build !hetzner

package certs

import "github.com/caddyserver/certmagic"

var newHetzner func(map[string]string) certmagic.DNSProvider
