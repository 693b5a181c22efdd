package certs

import (
	"github.com/caddyserver/certmagic"
	"github.com/libdns/ovh"
)

func init() {
	registerDNS(DNSProvider{Name: "ovh", Variables: func() DNSVariables { return new(OVH) }})
}

// OVH are the variables of DERP_DNS_PROVIDER=ovh.
type OVH struct {
	Endpoint          string `envconfig:"DERP_DNS_OVH_ENDPOINT" default:"ovh-eu" options:"ovh-eu,ovh-ca,ovh-us,kimsufi-eu,kimsufi-ca,soyoustart-eu,soyoustart-ca" desc:"ovh-eu, ovh-ca, ovh-us, kimsufi-eu, kimsufi-ca, soyoustart-eu or soyoustart-ca" zh:"ovh-eu、ovh-ca、ovh-us、kimsufi-eu、kimsufi-ca、soyoustart-eu 或 soyoustart-ca"`
	ApplicationKey    string `envconfig:"DERP_DNS_OVH_APPLICATION_KEY" desc:"application key" zh:"application key"`
	ApplicationSecret string `envconfig:"DERP_DNS_OVH_APPLICATION_SECRET" secret:"true" desc:"application secret" zh:"application secret"`
	ConsumerKey       string `envconfig:"DERP_DNS_OVH_CONSUMER_KEY" secret:"true" desc:"consumer key" zh:"consumer key"`
}

func (v *OVH) provider() certmagic.DNSProvider {
	return &ovh.Provider{Endpoint: v.Endpoint, ApplicationKey: v.ApplicationKey, ApplicationSecret: v.ApplicationSecret, ConsumerKey: v.ConsumerKey}
}
