//go:build !route53

package certs

import "github.com/caddyserver/certmagic"

var newRoute53 func(map[string]string) certmagic.DNSProvider
