package config

// railway supplies the defaults for Railway with docker/railway/railway.ts: TCP
// through one proxy, on a port that Railway chooses, and no UDP.
func railway(env, set map[string]string) *platform {
	host, port, inside := env["RAILWAY_TCP_PROXY_DOMAIN"], env["RAILWAY_TCP_PROXY_PORT"], env["RAILWAY_TCP_APPLICATION_PORT"]
	r := &platform{name: "Railway", defaults: map[string]string{
		"DERP_HTTP_PORT": "-1",
		"DERP_STUN":      "false",
		// All clients come from the addresses of the proxy.
		"DERP_MAX_PER_ADDRESS": "off",
		"DERP_ACCEPT_RATE":     "off",
	}}
	if host == "" || port == "" || inside == "" {
		r.refuse = func(p *problems, _ *environment) {
			p.add("RAILWAY_TCP_PROXY_DOMAIN", "this service has no TCP proxy, and Railway's HTTP edge does not carry DERP; make one with `railway tcp-proxy create --port 8443`, and deploy again")
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
		r.defaults["DERP_CERT_MODE"] = ModePinned
	}
	if volume := env["RAILWAY_VOLUME_MOUNT_PATH"]; volume != "" {
		r.defaults["DERP_DATA_DIR"] = volume
	} else {
		r.warnings = append(r.warnings, "this service has no volume: node key and certificate, and with them the map, change with every deployment; add a volume, as docker/railway/railway.ts does")
	}
	r.refuse = func(p *problems, e *environment) { refuseOnRailway(p, e, host) }
	return r
}

// refuseOnRailway refuses proofs of a name that Railway makes impossible; host is
// the TCP proxy.
func refuseOnRailway(p *problems, e *environment, host string) {
	switch {
	case e.given["DERP_DNS_PROVIDER"] && !e.given["DERP_DOMAIN"]:
		p.add("DERP_DOMAIN", "want a name of yours that is a CNAME to %s, since DERP_DNS_PROVIDER is set; got nothing", host)
	case (e.Mode == ModeLetsEncrypt || e.Mode == modeGCP) && e.Provider == "":
		p.add("DERP_CERT_MODE", "%s cannot prove a name on Railway, which has no port 80 or 443 for the relay; set DERP_DNS_PROVIDER, or remove this to get a pinned certificate", e.Mode)
	}
}
