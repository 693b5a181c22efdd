//go:build !route53

package certs

import "github.com/caddyserver/certmagic"

func (*Route53) provider() certmagic.DNSProvider { return nil }
