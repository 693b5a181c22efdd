package certs

func init() {
	registerDNS(DNSProvider{Name: "route53", Tag: "route53", Variables: func() DNSVariables { return new(Route53) }})
}

// Route53 are the variables of DERP_DNS_PROVIDER=route53.
type Route53 struct {
	AccessKeyID     string `envconfig:"DERP_DNS_ROUTE53_ACCESS_KEY_ID" desc:"access key ID" zh:"access key ID"`
	SecretAccessKey string `envconfig:"DERP_DNS_ROUTE53_SECRET_ACCESS_KEY" secret:"true" desc:"secret access key" zh:"secret access key"`
	SessionToken    string `envconfig:"DERP_DNS_ROUTE53_SESSION_TOKEN" secret:"true" optional:"true" desc:"session token, for temporary credentials" zh:"session token，仅用于临时凭证"`
	Region          string `envconfig:"DERP_DNS_ROUTE53_REGION" default:"us-east-1" desc:"AWS region" zh:"AWS 区域"`
	HostedZoneID    string `envconfig:"DERP_DNS_ROUTE53_HOSTED_ZONE_ID" optional:"true" desc:"hosted zone; if empty, found by name" zh:"托管区域的 ID；不填则按名称查找"`
}
