package config

import (
	"strings"

	"github.com/rs/zerolog"

	"derpd/internal/redact"
	"derpd/relay/admit"
)

func init() {
	registerSource(sourceKind{name: "tailnet", closes: "DERP_TAILNET_OAUTH_CLIENT_ID", env: func() sourceEnv { return new(TailnetEnv) }})
}

// TailnetEnv are the credentials of Tailscale's API, one for each tailnet.
type TailnetEnv struct {
	APIKey       string `envconfig:"DERP_TAILNET_API_KEY" secret:"true" desc:"Tailscale API access token (tskey-api-…): the devices of its tailnet may connect; several, comma-separated" zh:"Tailscale API 访问令牌（tskey-api-…）：其 tailnet 的设备可以连接；可以有多个，逗号分隔"`
	ClientID     string `envconfig:"DERP_TAILNET_OAUTH_CLIENT_ID" desc:"the same with an OAuth client with the scope devices:core:read, which does not expire; several, comma-separated" zh:"同上，使用带 devices:core:read 权限、不会过期的 OAuth 客户端；可以有多个，逗号分隔"`
	ClientSecret string `envconfig:"DERP_TAILNET_OAUTH_CLIENT_SECRET" secret:"true" desc:"the secrets of the OAuth clients, in the same order" zh:"OAuth 客户端的密钥，顺序相同"`
	Tailnet      string `envconfig:"DERP_TAILNET" desc:"names of the tailnets, one for each API key and then for each OAuth client" zh:"tailnet 的名称，先按 API 令牌、再按 OAuth 客户端的顺序各一个" or:"the credential's own" zhor:"凭据自己的 tailnet"`
	APIURL       string `envconfig:"DERP_TAILNET_API_URL" default:"https://api.tailscale.com" secret:"url" desc:"URL of Tailscale's API, or of a proxy of yours that can reach it" zh:"Tailscale API 的网址，或你自己的、能访问它的代理的网址"`
	External     string `envconfig:"DERP_TAILNET_EXTERNAL" default:"false" desc:"whether devices that others share into the tailnet may connect too" zh:"别人共享进 tailnet 的设备是否也可以连接"`
}

func (env *TailnetEnv) parse(p *problems, shared sharedByAll) parsedSources {
	var parsed parsedSources
	for _, tailnet := range env.tailnets(p, shared) {
		parsed.list = append(parsed.list, Source{Name: "tailnet", Variable: "DERP_TAILNET", Target: tailnet.Tailnet, New: func(log zerolog.Logger) (admit.Source, error) {
			tailnet.Log = log
			return admit.Tailnet(tailnet)
		}})
	}
	return parsed
}

// tailnets returns the tailnets, those of API keys first.
func (env *TailnetEnv) tailnets(p *problems, shared sharedByAll) []admit.TailnetConfig {
	list := env.credentials(p)
	names := p.list("DERP_TAILNET", env.Tailnet)
	base, ok := parseURL(env.APIURL)
	if !ok {
		p.add("DERP_TAILNET_API_URL", "want an http or https URL, got %q", redact.URL(env.APIURL))
	}
	if ok && isClear(base) && len(list) > 0 {
		p.add("DERP_TAILNET_API_URL", "%s would get the credentials of the tailnet over http, and everybody on the way could read them; write https://", redact.URL(env.APIURL))
	}
	external := p.boolean("DERP_TAILNET_EXTERNAL", env.External)
	const unused = "is only used with DERP_TAILNET_API_KEY or DERP_TAILNET_OAUTH_CLIENT_ID, but neither is set; set one of them, or remove this"
	credentialsFailed := p.has("DERP_TAILNET_API_KEY") || p.has("DERP_TAILNET_OAUTH_CLIENT_ID") || p.has("DERP_TAILNET_OAUTH_CLIENT_SECRET")
	switch {
	case credentialsFailed:
		return nil
	case len(list) == 0 && len(names) > 0:
		p.add("DERP_TAILNET", unused)
	case len(list) == 0 && external:
		p.add("DERP_TAILNET_EXTERNAL", unused)
	case len(names) > 0 && len(names) != len(list):
		p.add("DERP_TAILNET", "want one name for each of the %d credentials, API keys first, or none; got %d", len(list), len(names))
		return nil
	}
	for i := range list {
		if len(names) > 0 {
			list[i].Tailnet = names[i]
		}
		list[i].BaseURL = base
		list[i].External = external
		list[i].Interval = shared.interval // admit.Tailnet raises it to what the API allows
		list[i].Grace = shared.grace
		list[i].Roots = shared.roots
	}
	return list
}

// credentials returns one configuration for each credential.
func (env *TailnetEnv) credentials(p *problems) []admit.TailnetConfig {
	var list []admit.TailnetConfig
	for _, apiKey := range p.list("DERP_TAILNET_API_KEY", env.APIKey) {
		if strings.HasPrefix(apiKey, "tskey-auth-") || strings.HasPrefix(apiKey, "tskey-client-") {
			p.add("DERP_TAILNET_API_KEY", "want an API access token (tskey-api-…); an auth key adds devices and cannot list them, and an OAuth client goes into DERP_TAILNET_OAUTH_CLIENT_ID and _SECRET")
		}
		list = append(list, admit.TailnetConfig{APIKey: apiKey})
	}
	ids := p.list("DERP_TAILNET_OAUTH_CLIENT_ID", env.ClientID)
	secrets := p.list("DERP_TAILNET_OAUTH_CLIENT_SECRET", env.ClientSecret)
	if len(ids) != len(secrets) {
		if !p.has("DERP_TAILNET_OAUTH_CLIENT_SECRET") {
			p.add("DERP_TAILNET_OAUTH_CLIENT_SECRET", "want one secret for each client ID; got %d in DERP_TAILNET_OAUTH_CLIENT_ID and %d here", len(ids), len(secrets))
		}
		return list
	}
	for i, id := range ids {
		list = append(list, admit.TailnetConfig{OAuthClientID: id, OAuthClientSecret: secrets[i]})
	}
	return list
}
