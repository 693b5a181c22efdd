package config

import (
	"strconv"
	"strings"
)

// flyHost is the host on which a program on Fly.io must listen for UDP. TCP does
// not work there.
const flyHost = "fly-global-services"

// flyProxies is the network of Fly.io's proxy. The machine's own address is in it
// too. Other machines connect from fdaa::/16.
const flyProxies = "172.16.0.0/12"

// flyIO supplies the defaults for Fly.io with docker/fly.toml. FLY_PUBLIC_IP is not
// used: it is the source address of outgoing connections, and accepts none.
func flyIO(env, set map[string]string) *platform {
	defaults := map[string]string{
		// Ports below 1024 are only for root.
		"DERP_ADDR":             ":8443",
		"DERP_HTTP_PORT":        "8080",
		"DERP_PUBLIC_PORT":      "443",
		"DERP_PUBLIC_HTTP_PORT": "80",
		"DERP_STUN_ADDR":        flyHost,
		"DERP_HEALTH_ADDR":      ":8081",
	}
	if set["DERP_DOMAIN"] == "" {
		defaults["DERP_DOMAIN"] = env["FLY_APP_NAME"] + ".fly.dev"
		// The name is Fly.io's, and a pinned certificate needs no proof of it.
		defaults["DERP_CERT_MODE"] = ModePinned
	}
	// Trust the proxy only with DERP_PROXY_PROTOCOL: otherwise it forwards
	// whatever headers clients send.
	if proxied, err := strconv.ParseBool(strings.ToLower(set["DERP_PROXY_PROTOCOL"])); err == nil && proxied {
		defaults["DERP_TRUSTED_PROXIES"] = flyProxies
	} else {
		// All clients come from the addresses of the proxy.
		defaults["DERP_MAX_PER_ADDRESS"], defaults["DERP_ACCEPT_RATE"] = "off", "off"
	}
	return &platform{name: "Fly.io", defaults: defaults, refuse: refuseOnFly}
}

func refuseOnFly(p *problems, e *environment) {
	if strings.HasPrefix(e.Addr, flyHost) {
		p.add("DERP_ADDR", "%s works for UDP only; write :8443, as in docker/fly.toml", flyHost)
	}
	if e.PublicSTUNPort != "" && e.PublicSTUNPort != "-1" && e.PublicSTUNPort != e.STUNPort {
		p.add("DERP_PUBLIC_STUN_PORT", "Fly.io forwards UDP to the same port; want %s, which is DERP_STUN_PORT, got %q", e.STUNPort, e.PublicSTUNPort)
	}
}
