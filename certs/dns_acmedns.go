package certs

import (
	"strings"

	"github.com/caddyserver/certmagic"
	"github.com/libdns/acmedns"
)

func init() {
	registerDNS(DNSProvider{Name: "acmedns", Variables: func() DNSVariables { return new(ACMEDNS) }})
}

// ACMEDNS are the variables of DERP_DNS_PROVIDER=acmedns.
type ACMEDNS struct {
	ServerURL string `envconfig:"DERP_DNS_ACMEDNS_SERVER_URL" is:"url" desc:"URL of the acme-dns server" zh:"acme-dns 服务器的网址"`
	Username  string `envconfig:"DERP_DNS_ACMEDNS_USERNAME" desc:"username from /register" zh:"/register 返回的 username"`
	Password  string `envconfig:"DERP_DNS_ACMEDNS_PASSWORD" secret:"true" desc:"password from /register" zh:"/register 返回的 password"`
	Subdomain string `envconfig:"DERP_DNS_ACMEDNS_SUBDOMAIN" desc:"subdomain from /register" zh:"/register 返回的 subdomain"`
}

func (v *ACMEDNS) provider() certmagic.DNSProvider {
	return &acmedns.Provider{ServerURL: strings.TrimSuffix(v.ServerURL, "/"), Username: v.Username, Password: v.Password, Subdomain: v.Subdomain}
}
