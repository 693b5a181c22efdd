package config

import (
	"encoding/base64"
	"net/netip"
	"slices"
	"strings"

	"github.com/caddyserver/certmagic"

	"derpd/certs"
)

// DNSEnv are the settings of DNS-01 that all DNS providers share.
type DNSEnv struct {
	Provider           string `envconfig:"DERP_DNS_PROVIDER" desc:"DNS-01 through the API of the domain's DNS provider: {providers}. Each has variables of its own, below" zh:"通过域名的 DNS 服务商的 API 做 DNS-01 验证：{providers}。各自的变量见下文"`
	Resolvers          string `envconfig:"DERP_DNS_RESOLVERS" desc:"DNS-01: DNS servers (HOST:PORT,…) that find the zone and check that the record is visible" zh:"DNS-01：用于查找区域并检查记录是否已生效的 DNS 服务器，HOST:PORT,…" or:"the system's for the zone, the zone's own for the record" zhor:"区域问系统的，记录问区域自己的"`
	PropagationTimeout string `envconfig:"DERP_DNS_PROPAGATION_TIMEOUT" default:"2m" desc:"DNS-01: longest wait for the record to become visible; 0 does not check" zh:"DNS-01：等待记录生效的最长时间；0 表示不检查"`
	Delegate           string `envconfig:"DERP_DNS_DELEGATE" desc:"DNS-01: the name, in a zone of the provider, to which _acme-challenge of each domain is a CNAME" zh:"DNS-01：服务商处某个区域里的名称，各域名的 _acme-challenge 都是指向它的 CNAME"`
}

// parseDNS parses what DNS-01 uses.
func parseDNS(p *problems, e *environment, challenges Challenges) *certs.DNSConfig {
	switch {
	case e.Provider == "" && !p.has("DERP_DNS_PROVIDER"):
		if challenges.DNS {
			p.add("DERP_ACME_CHALLENGES", "dns needs the provider of the domain's DNS; set DERP_DNS_PROVIDER")
		}
		for _, v := range variablesOf(&e.DNSEnv) {
			if e.given[v.Name] {
				p.add(v.Name, "is only used with DERP_DNS_PROVIDER, but that is not set; set that, or remove this")
			}
		}
	case e.Provider != "" && !challenges.DNS:
		p.add("DERP_DNS_PROVIDER", "is only used with the challenge dns, but DERP_ACME_CHALLENGES is %s; add dns there, or remove one of the two", e.challenges())
	}
	c := &certs.DNSConfig{
		Provider:           parseProvider(p, e),
		Resolvers:          p.list("DERP_DNS_RESOLVERS", e.Resolvers),
		PropagationTimeout: p.duration("DERP_DNS_PROPAGATION_TIMEOUT", e.PropagationTimeout, "2m or 90s", 0),
		Delegate:           strings.TrimSuffix(e.Delegate, "."),
	}
	for _, server := range c.Resolvers {
		if !isServer(server) {
			p.add("DERP_DNS_RESOLVERS", "want DNS servers as HOST:PORT, comma-separated, got %q", server)
		}
	}
	if c.Delegate != "" && !isRecordName(c.Delegate) {
		p.add("DERP_DNS_DELEGATE", "want the DNS name to which _acme-challenge of each domain is a CNAME, got %q", e.Delegate)
	}
	return c
}

// parseProvider makes the DNS provider. It returns nil if something is missing.
func parseProvider(p *problems, e *environment) certmagic.DNSProvider {
	refuseOtherProviders(p, e)
	all := certs.DNSProviders()
	i := slices.IndexFunc(all, func(d certs.DNSProvider) bool { return d.Name == e.Provider })
	switch {
	case e.Provider == "":
		return nil
	case i == -1:
		p.add("DERP_DNS_PROVIDER", "want %s, got %q", either(providerNames()), e.Provider)
		return nil
	case !all[i].Included():
		p.add("DERP_DNS_PROVIDER", "%s is not in this build, since it adds megabytes; build derpd with `-tags %s`, or the image with `--build-arg TAGS=%s`", all[i].Name, all[i].Tag, all[i].Tag)
		return nil
	}
	variables := e.providers[e.Provider]
	before := len(p.found)
	for _, v := range variablesOf(variables) {
		checkCredential(p, v, e.Provider)
	}
	if len(p.found) > before || slices.ContainsFunc(variablesOf(variables), func(v Variable) bool { return p.has(v.Name) }) {
		return nil
	}
	return certs.NewDNSProvider(variables)
}

// refuseOtherProviders refuses the variables of providers that are not used: the
// operator expects another provider.
func refuseOtherProviders(p *problems, e *environment) {
	for name, variables := range e.providers {
		if name == e.Provider {
			continue
		}
		for _, v := range variablesOf(variables) {
			switch {
			case !e.given[v.Name]:
			case e.Provider == "":
				p.add(v.Name, "is only used with DERP_DNS_PROVIDER=%s, but no provider is set; set that, or remove this", name)
			default:
				p.add(v.Name, "is only used with DERP_DNS_PROVIDER=%s, but the provider is %s; remove one of the two", name, e.Provider)
			}
		}
	}
}

// rules are the values of the tag is.
var rules = map[string]struct {
	want  string
	valid func(string) bool
}{
	"url":      {"an http or https URL", func(s string) bool { _, ok := parseURL(s); return ok }},
	"ip":       {"an IP address", func(s string) bool { _, err := netip.ParseAddr(s); return err == nil }},
	"hostport": {"HOST:PORT", isServer},
	"base64":   {"base64", func(s string) bool { _, err := base64.StdEncoding.DecodeString(s); return err == nil }},
}

// checkCredential checks one variable of a provider by its tags.
func checkCredential(p *problems, v Variable, provider string) {
	rule, hasRule := rules[v.tag("is")]
	want, valid := rule.want, !hasRule || rule.valid(v.Value)
	if options := splitList(v.tag("options")); len(options) > 0 {
		want, valid = either(options), slices.Contains(options, v.Value)
	}
	switch {
	case v.Value == "" && v.Optional() || p.has(v.Name):
	case v.Value == "":
		p.add(v.Name, "want a value (%s), since DERP_DNS_PROVIDER is %s; got nothing", v.tag("desc"), provider)
	case valid:
	case v.Secret():
		p.add(v.Name, "want %s, got something else", want)
	default:
		p.add(v.Name, "want %s, got %q", want, v.Value)
	}
}

func providerNames() []string {
	var names []string
	for _, d := range certs.DNSProviders() {
		names = append(names, d.Name)
	}
	return names
}
