package config

import (
	"cmp"
	"encoding/base64"
	"net"
	"net/mail"
	"net/url"

	"derpd/certs"
)

// ACMEEnv are the authority and the account.
type ACMEEnv struct {
	CA         string `envconfig:"DERP_ACME_CA" desc:"letsencrypt, letsencrypt-staging, zerossl, google, or the https URL of a directory" zh:"letsencrypt、letsencrypt-staging、zerossl、google，或 ACME 目录的 https 网址" or:"letsencrypt; google if DERP_CERT_MODE is gcp" zhor:"letsencrypt；DERP_CERT_MODE 为 gcp 时是 google"`
	OldRoots   string `envconfig:"DERP_ACME_CA_ROOTS" desc:"old name of DERP_CA_ROOTS; the authority is verified by these roots alone" zh:"DERP_CA_ROOTS 的旧名；验证 ACME 机构时只用这些根证书"`
	Email      string `envconfig:"DERP_ACME_EMAIL" desc:"address for the authority's notices" zh:"接收机构通知的邮箱"`
	KeyID      string `envconfig:"DERP_ACME_EAB_KID" desc:"external account binding: key ID" zh:"外部账户绑定：密钥 ID"`
	Key        string `envconfig:"DERP_ACME_EAB_KEY" secret:"true" desc:"external account binding: MAC key, base64" zh:"外部账户绑定：MAC 密钥，base64"`
	Challenges string `envconfig:"DERP_ACME_CHALLENGES" desc:"allowed ACME challenges: http, tls-alpn, dns. With dns and others, dns is tried first; the others if dns fails, and always for IP addresses" zh:"允许的 ACME 验证方式：http、tls-alpn、dns。和 dns 一起写的其他方式在 dns 失败时使用，IP 地址总是用它们" or:"http,tls-alpn; dns if DERP_DNS_PROVIDER is set" zhor:"http,tls-alpn；设置了 DERP_DNS_PROVIDER 时为 dns"`
}

// The authority when DERP_ACME_CA is not set, and the one of DERP_CERT_MODE=gcp.
const (
	defaultAuthority = "letsencrypt"
	googleAuthority  = "google"
)

// Challenges are the ACME challenges that may be used.
type Challenges struct {
	HTTP, TLSALPN, DNS bool
}

// parseACME parses what mode letsencrypt uses.
func parseACME(p *problems, e *environment, domains []string, listen Listen, storage Storage, roots roots) (certs.ACMEConfig, Challenges) {
	if len(domains) == 0 {
		refuseNoDomain(p, ModeLetsEncrypt)
	}
	authority := parseAuthority(p, e.Mode, e.CA)
	keyID, key := parseAccountBinding(p, e.ACMEEnv, authority == googleAuthority)
	if e.Email != "" {
		if _, err := mail.ParseAddress(e.Email); err != nil {
			p.add("DERP_ACME_EMAIL", "want an e-mail address, got %q", e.Email)
		}
	}
	challenges := parseChallenges(p, e.challenges(), domains, listen)
	c := certs.ACMEConfig{
		Names:     domains,
		Directory: cmp.Or(certs.Directories[authority], authority),
		Roots:     roots.authority,
		Email:     e.Email,
		EABKeyID:  keyID,
		EABKey:    key,
		Dir:       storage.CertDir,
	}
	if dns := parseDNS(p, e, challenges); challenges.DNS {
		c.DNS = dns
	}
	return c, challenges
}

// parseAuthority returns the name of a known authority, or the URL of another.
func parseAuthority(p *problems, mode, authority string) string {
	if mode == modeGCP {
		if authority != "" && authority != googleAuthority {
			p.add("DERP_ACME_CA", "DERP_CERT_MODE=gcp means google, got %q; set DERP_CERT_MODE=letsencrypt for another authority", authority)
		}
		return googleAuthority
	}
	authority = cmp.Or(authority, defaultAuthority)
	u, err := url.Parse(authority)
	if certs.Directories[authority] == "" && (err != nil || u.Scheme != "https" || u.Host == "") {
		p.add("DERP_ACME_CA", "want letsencrypt, letsencrypt-staging, zerossl, google or the https URL of an ACME directory, got %q", authority)
	}
	return authority
}

// parseAccountBinding returns the key's ID and the key in the form of RFC 8555.
func parseAccountBinding(p *problems, env ACMEEnv, google bool) (id, macKey string) {
	switch {
	case env.KeyID != "" && env.Key == "":
		if !p.has("DERP_ACME_EAB_KEY") {
			p.add("DERP_ACME_EAB_KEY", "want the key that belongs to DERP_ACME_EAB_KID, got nothing")
		}
	case env.KeyID == "" && p.has("DERP_ACME_EAB_KID"):
	case env.KeyID == "" && env.Key != "":
		p.add("DERP_ACME_EAB_KID", "want the ID that belongs to DERP_ACME_EAB_KEY, got nothing")
	case env.KeyID == "" && google:
		p.add("DERP_ACME_EAB_KID", "Google's authority needs an external account binding; make one with `gcloud publicca external-account-keys create`")
	case env.Key != "":
		key, ok := base64URL(env.Key)
		if !ok {
			p.add("DERP_ACME_EAB_KEY", "want base64, got something else")
		}
		return env.KeyID, key
	}
	return env.KeyID, env.Key
}

// base64URL brings a MAC key into the base64url form of RFC 8555. Some authorities
// issue the padded standard form.
func base64URL(s string) (string, bool) {
	for _, encoding := range []*base64.Encoding{base64.RawURLEncoding, base64.StdEncoding, base64.URLEncoding, base64.RawStdEncoding} {
		if raw, err := encoding.DecodeString(s); err == nil {
			return base64.RawURLEncoding.EncodeToString(raw), true
		}
	}
	return "", false
}

// challenges is DERP_ACME_CHALLENGES, or its default.
func (e *environment) challenges() string {
	if e.Challenges == "" && e.Provider != "" {
		return "dns"
	}
	return cmp.Or(e.Challenges, "http,tls-alpn")
}

func parseChallenges(p *problems, value string, domains []string, listen Listen) Challenges {
	var c Challenges
	for _, challenge := range p.list("DERP_ACME_CHALLENGES", value) {
		switch challenge {
		case "http":
			c.HTTP = true
		case "tls-alpn":
			c.TLSALPN = true
		case "dns":
			c.DNS = true
		default:
			p.add("DERP_ACME_CHALLENGES", "want http, tls-alpn, dns or several of them, got %q", challenge)
		}
	}
	if c.HTTP && !c.TLSALPN && listen.HTTP == "" && !p.has("DERP_HTTP_PORT") {
		p.add("DERP_ACME_CHALLENGES", "http needs the plain HTTP listener, but DERP_HTTP_PORT is -1; set that to a port, or remove http here")
	}
	if c == (Challenges{DNS: true}) {
		for _, name := range domains {
			if net.ParseIP(name) != nil {
				p.add("DERP_DOMAIN", "want names alone, since DNS cannot prove an address (RFC 8738), got %q; add http or tls-alpn to DERP_ACME_CHALLENGES, or leave the address out", name)
			}
		}
	}
	return c
}
