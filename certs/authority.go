package certs

import (
	"context"
	"crypto/tls"
	"net/http"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/mholt/acmez/v3/acme"
)

// Directories are the URLs of the authorities that have a name.
var Directories = map[string]string{
	"letsencrypt":         certmagic.LetsEncryptProductionCA,
	"letsencrypt-staging": certmagic.LetsEncryptStagingCA,
	"zerossl":             certmagic.ZeroSSLProductionCA,
	"google":              certmagic.GoogleTrustProductionCA,
}

// shortlived is the certificate profile that authorities require for IP
// addresses (RFC 8738; Let's Encrypt's profiles).
const shortlived = "shortlived"

// reachTimeout limits one request for the authority's directory.
const reachTimeout = 30 * time.Second

// issuers returns certmagic's issuers in the order of their use. DNS-01 and the
// listeners' challenges need one issuer each, because an issuer with a DNS-01
// solver uses nothing else.
func (a *ACME) issuers(profile string) []certmagic.ACMEIssuer {
	c := a.config
	issuer := certmagic.ACMEIssuer{
		CA:                      c.Directory,
		TrustedRoots:            c.Roots,
		Email:                   c.Email,
		Agreed:                  true,
		Profile:                 profile,
		ListenHost:              c.ListenHost,
		AltHTTPPort:             c.HTTPPort,
		AltTLSALPNPort:          c.TLSPort,
		DisableHTTPChallenge:    c.HTTPPort == 0,
		DisableTLSALPNChallenge: c.TLSPort == 0,
		// Only one relay uses a data directory.
		DisableDistributedSolvers: true,
		Logger:                    zapLogger(c.Log),
	}
	if c.EABKeyID != "" {
		issuer.ExternalAccount = &acme.EAB{KeyID: c.EABKeyID, MACKey: c.EABKey}
	}
	if c.DNS == nil || profile == shortlived {
		return []certmagic.ACMEIssuer{issuer}
	}
	byDNS := issuer
	byDNS.DNS01Solver = c.DNS.solver(issuer.Logger)
	if c.HTTPPort == 0 && c.TLSPort == 0 {
		return []certmagic.ACMEIssuer{byDNS}
	}
	return []certmagic.ACMEIssuer{byDNS, issuer}
}

// reach requests the authority's directory. The request has no rate limit, so it
// may be retried within seconds; certmagic's own retries begin after a minute.
func (a *ACME) reach(ctx context.Context) error {
	client := &http.Client{
		Timeout: reachTimeout,
		Transport: &http.Transport{
			Proxy:             http.ProxyFromEnvironment,
			TLSClientConfig:   &tls.Config{RootCAs: a.config.Roots, MinVersion: tls.VersionTLS12},
			DisableKeepAlives: true,
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.config.Directory, http.NoBody)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	return res.Body.Close()
}
