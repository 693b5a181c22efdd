package main

import (
	"slices"
	"strconv"
	"strings"
)

// platform is a cloud that tells a program where it runs. What it dictates
// becomes the defaults; what the operator sets stays as it is.
type platform struct {
	name string

	// defaults are values of DERP_ variables.
	defaults map[string]string

	// reject names what was set and cannot work here.
	reject func(p *parser)

	// warnings are for the operator.
	warnings []string
}

// detect finds the platform by what it puts into the environment; nil
// elsewhere. set has the DERP_ variables that are set.
func detect(env, set map[string]string) *platform {
	switch {
	case env["FLY_APP_NAME"] != "":
		return flyIO(env, set)
	case env["RAILWAY_PROJECT_ID"] != "":
		return railway(env, set)
	}
	return nil
}

// flyHost is where a program on Fly.io must listen for UDP, and must not for
// TCP.
const flyHost = "fly-global-services"

// flyProxies is where Fly.io's proxy comes from: a machine has an address in a
// network of its own in there, and other machines come from elsewhere (fdaa::/16).
const flyProxies = "172.16.0.0/12"

// flyIO describes Fly.io with docker/fly.toml. FLY_PUBLIC_IP has no part in
// it: that is the address of outgoing connections, on which nothing arrives.
func flyIO(env, set map[string]string) *platform {
	f := &platform{name: "Fly.io", defaults: map[string]string{
		// A port below 1024 is only for root.
		"DERP_ADDR":             ":8443",
		"DERP_HTTP_PORT":        "8080",
		"DERP_PUBLIC_PORT":      "443",
		"DERP_PUBLIC_HTTP_PORT": "80",
		"DERP_STUN_ADDR":        flyHost,
		"DERP_HEALTH_ADDR":      ":8081",
	}}
	if set["DERP_DOMAIN"] == "" {
		f.defaults["DERP_DOMAIN"] = env["FLY_APP_NAME"] + ".fly.dev"
		// The name is Fly.io's: a pin needs nobody's consent.
		f.defaults["DERP_CERT_MODE"] = modePinned
	}
	// Not without that: a proxy that adds no header hands on its clients'.
	if proxied, err := strconv.ParseBool(strings.ToLower(set["DERP_PROXY_PROTOCOL"])); err == nil && proxied {
		f.defaults["DERP_TRUSTED_PROXIES"] = flyProxies
	}
	f.reject = func(p *parser) {
		if strings.HasPrefix(p.Addr, flyHost) {
			p.fail("DERP_ADDR", "%s is for UDP alone; want :8443, as docker/fly.toml has it", flyHost)
		}
		if p.PublicSTUN != "" && p.PublicSTUN != "-1" && p.PublicSTUN != p.STUNUDP {
			p.fail("DERP_PUBLIC_STUN_PORT", "Fly.io hands UDP on to the same port; want %s, which is DERP_STUN_PORT, got %q", p.STUNUDP, p.PublicSTUN)
		}
	}
	return f
}

// railway describes Railway with docker/railway/railway.ts: TCP through one
// proxy on a port that Railway chooses, and no UDP.
func railway(env, set map[string]string) *platform {
	host, port, inside := env["RAILWAY_TCP_PROXY_DOMAIN"], env["RAILWAY_TCP_PROXY_PORT"], env["RAILWAY_TCP_APPLICATION_PORT"]
	r := &platform{name: "Railway", defaults: map[string]string{
		"DERP_HTTP_PORT": "-1",
		"DERP_STUN":      "false",
	}}
	if host == "" || port == "" || inside == "" {
		r.reject = func(p *parser) {
			p.fail("RAILWAY_TCP_PROXY_DOMAIN", "this service has no TCP proxy, and Railway's HTTP edge carries no DERP; make one with `railway tcp-proxy create --port 8443`, and deploy again")
		}
		return r
	}
	r.defaults["DERP_ADDR"] = ":" + inside
	r.defaults["DERP_PUBLIC_PORT"] = port
	if env["PORT"] != "" {
		r.defaults["DERP_HEALTH_ADDR"] = ":" + env["PORT"]
	}
	if set["DERP_DOMAIN"] == "" {
		r.defaults["DERP_DOMAIN"] = host
	}
	if set["DERP_DNS_PROVIDER"] == "" {
		r.defaults["DERP_CERT_MODE"] = modePinned
	}
	if volume := env["RAILWAY_VOLUME_MOUNT_PATH"]; volume != "" {
		r.defaults["DERP_DATA_DIR"] = volume
	} else {
		r.warnings = append(r.warnings, "this service has no volume: node key and certificate, and with it the map, change with every deployment; docker/railway/railway.ts has one")
	}
	r.reject = func(p *parser) {
		switch {
		case p.given["DERP_DNS_PROVIDER"] && !p.given["DERP_DOMAIN"]:
			p.fail("DERP_DOMAIN", "want a name of yours that is a CNAME to %s, since DERP_DNS_PROVIDER is set; got nothing", host)
		case (p.CertMode == modeLetsEncrypt || p.CertMode == "gcp") && p.DNS == "":
			p.fail("DERP_CERT_MODE", "%s cannot prove a name on Railway, which has no port 80 or 443 for the relay; set DERP_DNS_PROVIDER, or leave this out for a pinned certificate", p.CertMode)
		}
	}
	return r
}

// assume fills the defaults of the platform into values, where nothing is set,
// and returns the names that it filled.
func (f *platform) assume(values map[string]string) []string {
	var names []string
	for name, value := range f.defaults {
		if values[name] == "" {
			values[name] = value
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}
