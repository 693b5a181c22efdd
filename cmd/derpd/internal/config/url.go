package config

import (
	"fmt"

	"github.com/rs/zerolog"

	"derpd/internal/redact"
	"derpd/relay/admit"
)

func init() {
	registerSource(sourceKind{name: "url", closes: "DERP_VERIFY_CLIENT_URL", env: func() sourceEnv { return new(URLEnv) }})
}

// URLEnv are the admission URLs to ask.
type URLEnv struct {
	URLs     string `envconfig:"DERP_VERIFY_CLIENT_URL" secret:"url" desc:"admission URLs, comma-separated (Headscale's /verify)" zh:"准入网址，逗号分隔（Headscale 的 /verify）"`
	FailOpen string `envconfig:"DERP_VERIFY_CLIENT_URL_FAIL_OPEN" default:"false" desc:"true: anybody may connect while an admission URL refuses connections, has no route, or its name does not exist; derper does the like by default" zh:"true：准入网址拒绝连接、没有路由，或域名不存在时，任何人都可以连接（derper 默认与此相近）"`
}

func (env *URLEnv) parse(p *problems, shared sharedByAll) parsedSources {
	var parsed parsedSources
	failOpen := p.boolean("DERP_VERIFY_CLIENT_URL_FAIL_OPEN", env.FailOpen)
	for _, target := range p.list("DERP_VERIFY_CLIENT_URL", env.URLs) {
		u, ok := parseURL(target)
		switch {
		case !ok:
			p.add("DERP_VERIFY_CLIENT_URL", "want http or https URLs, got %q", redact.URL(target))
			continue
		case isClear(u) && (u.User != nil || u.RawQuery != ""):
			p.add("DERP_VERIFY_CLIENT_URL", "%s would be asked over http, and everybody on the way could read the user, password or query of the URL; write https://", redact.URL(target))
			continue
		case isClear(u):
			parsed.warnings = append(parsed.warnings, fmt.Sprintf("DERP_VERIFY_CLIENT_URL: %s is asked over http, so everybody on the way may admit any node; write https://, or keep the way inside one host or container network", redact.URL(target)))
		}
		parsed.list = append(parsed.list, Source{
			Name:     "url",
			Variable: "DERP_VERIFY_CLIENT_URL",
			Target:   redact.URL(target),
			New: func(log zerolog.Logger) (admit.Source, error) {
				return admit.URL(admit.URLConfig{Target: target, FailOpen: failOpen, Roots: shared.roots, Log: log}), nil
			},
		})
	}
	switch {
	case !failOpen:
	case env.URLs == "" && !p.has("DERP_VERIFY_CLIENT_URL"):
		p.add("DERP_VERIFY_CLIENT_URL_FAIL_OPEN", "is only used with DERP_VERIFY_CLIENT_URL, but that is not set; set that, or remove this")
	default:
		parsed.warnings = append(parsed.warnings, "DERP_VERIFY_CLIENT_URL_FAIL_OPEN admits anybody while an admission URL cannot be reached; without it, nodes that were admitted before stay admitted for DERP_VERIFY_GRACE")
	}
	return parsed
}
