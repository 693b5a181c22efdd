package config

import (
	"net/http"

	"derpd/relay"
)

// WebEnv is what browsers and bootstrap clients get.
type WebEnv struct {
	BootstrapDNS string `envconfig:"DERP_BOOTSTRAP_DNS" desc:"names answered at /bootstrap-dns, comma-separated" zh:"/bootstrap-dns 回答的域名，逗号分隔"`
	Home         string `envconfig:"DERP_HOME" default:"blank" desc:"what a browser gets: blank, page, or a URL to redirect to" zh:"浏览器看到的内容：blank、page，或要跳转到的网址"`
}

// Web is what browsers and bootstrap clients get.
type Web struct {
	BootstrapDNS []string // names to resolve
	Home         http.Handler
}

func parseWeb(p *problems, env WebEnv) Web {
	w := Web{BootstrapDNS: p.list("DERP_BOOTSTRAP_DNS", env.BootstrapDNS)}
	for _, name := range w.BootstrapDNS {
		if !isHostName(name) {
			p.add("DERP_BOOTSTRAP_DNS", "want DNS names, got %q", name)
		}
	}
	var err error
	if w.Home, err = relay.Home(env.Home); err != nil {
		p.add("DERP_HOME", "%w", err)
	}
	return w
}
