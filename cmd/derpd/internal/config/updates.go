package config

import (
	"strings"
	"time"
)

// UpdatesEnv is the search for newer releases.
type UpdatesEnv struct {
	UpdateCheck string `envconfig:"DERP_UPDATE_CHECK" default:"off" desc:"interval at which derpd asks whether a newer release is out, such as 24h; at least 1h; off is never" zh:"多久询问一次有没有新版本，例如 24h，最短 1h；off 表示不询问"`
}

// Updates is the search for newer releases.
type Updates struct {
	Every   time.Duration // between two questions; 0 is never
	GoProxy string        // GOPROXY, as given
}

func parseUpdates(p *problems, env UpdatesEnv, environ []string) Updates {
	u := Updates{GoProxy: GoProxy(environ)}
	if env.UpdateCheck != "off" {
		u.Every = p.duration("DERP_UPDATE_CHECK", env.UpdateCheck, "24h, or off", time.Hour)
	}
	return u
}

// GoProxy returns GOPROXY, a variable of the go command, which names the module
// proxy to ask for releases. Empty is Go's default.
func GoProxy(environ []string) string {
	value := ""
	for _, pair := range environ {
		if v, ok := strings.CutPrefix(pair, "GOPROXY="); ok {
			value = v
		}
	}
	return value
}
