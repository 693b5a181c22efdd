package certs

func init() {
	registerDNS(DNSProvider{Name: "hetzner", Tag: "hetzner", Variables: func() DNSVariables { return new(Hetzner) }})
}

// Hetzner are the variables of DERP_DNS_PROVIDER=hetzner.
type Hetzner struct {
	APIToken string `envconfig:"DERP_DNS_HETZNER_API_TOKEN" secret:"true" desc:"API token of the Cloud console's project that holds the zone" zh:"该区域所在的 Cloud Console 项目的 API 令牌"`
}
