package main

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"

	"derpd/relay"
	"derpd/relay/admit"
)

// open reports whether anybody may use the relay.
func (c *config) open() bool {
	return len(c.sockets) == 0 && len(c.verifyURLs) == 0 && c.keys == nil && c.keysFile == "" && len(c.tailnets) == 0
}

func (p *parser) admission(c *config) {
	c.grace = p.duration("DERP_VERIFY_GRACE", p.Grace, 0)
	c.verifyInterval = p.duration("DERP_VERIFY_INTERVAL", p.Interval, time.Second)
	sockets := p.list("DERP_TAILSCALED_SOCKET", p.Socket)
	for _, s := range sockets {
		if !filepath.IsAbs(s) {
			p.fail("DERP_TAILSCALED_SOCKET", "want absolute paths, got %q", s)
		}
	}
	useSockets := false
	switch value := strings.ToLower(p.Verify); value {
	case "auto":
		sockets = slices.DeleteFunc(sockets, func(s string) bool {
			info, err := os.Stat(s)
			return err != nil || info.Mode().Type() != fs.ModeSocket
		})
		useSockets = true
	default:
		b, err := strconv.ParseBool(value)
		if err != nil {
			p.fail("DERP_VERIFY_CLIENTS", "want auto, true or false, got %q", p.Verify)
		}
		useSockets = b
	}
	if useSockets {
		c.sockets = sockets
	}
	p.verifyURL(c)
	p.allowKeys(c)
	p.tailnet(c)
	c.disallowApps = p.list("DERP_DISALLOW_APPS", p.Disallow)
	c.openOnOrder = c.open() && !useSockets
}

// verifyURL reads the admission URLs.
func (p *parser) verifyURL(c *config) {
	for _, target := range p.list("DERP_VERIFY_CLIENT_URL", p.VerifyURL) {
		if _, ok := httpURL(target); !ok {
			p.fail("DERP_VERIFY_CLIENT_URL", "want http or https URLs, got %q", admit.RedactURL(target))
			continue
		}
		c.verifyURLs = append(c.verifyURLs, target)
	}
	c.failOpen = p.yes("DERP_VERIFY_CLIENT_URL_FAIL_OPEN", p.FailOpen)
	switch {
	case !c.failOpen:
	case p.VerifyURL == "":
		p.fail("DERP_VERIFY_CLIENT_URL_FAIL_OPEN", "has no meaning without DERP_VERIFY_CLIENT_URL; remove it")
	default:
		c.warnings = append(c.warnings, "DERP_VERIFY_CLIENT_URL_FAIL_OPEN lets anybody in while an admission URL cannot be reached; known nodes stay welcome without it, see DERP_VERIFY_GRACE")
	}
}

// httpURL parses the URL of something that speaks HTTP.
func httpURL(value string) (*url.URL, bool) {
	u, err := url.Parse(value)
	return u, err == nil && u.Host != "" && (u.Scheme == "http" || u.Scheme == "https")
}

// allowKeys reads the node keys: from the value, or from a file that is read
// again when it changes, which both DERP_ALLOW_KEYS=/path and
// DERP_ALLOW_KEYS_FILE=/path name.
func (p *parser) allowKeys(c *config) {
	value := p.AllowKeys
	path, fromFile := p.fromFile["DERP_ALLOW_KEYS"]
	name := "DERP_ALLOW_KEYS"
	switch {
	case value == "":
		return
	case fromFile:
		name += "_FILE"
	case strings.HasPrefix(value, "/") || strings.HasPrefix(value, "./"):
		path = value
	default:
		keys, err := admit.ParseKeys(value)
		if err != nil {
			p.fail(name, "%w", err)
			return
		}
		c.keys = keys
		return
	}
	if _, err := admit.LoadKeys(path); err != nil {
		p.fail(name, "%w%s", err, secretHint(err))
	}
	c.keysFile = path
}

// tailnet reads the credentials of Tailscale's API, one for each tailnet: API
// keys first, then OAuth clients.
func (p *parser) tailnet(c *config) {
	names := p.list("DERP_TAILNET", p.Tailnet)
	ids := p.list("DERP_TAILNET_OAUTH_CLIENT_ID", p.OAuthID)
	secrets := p.list("DERP_TAILNET_OAUTH_CLIENT_SECRET", p.OAuthSecret)
	var list []admit.TailnetConfig
	for _, apiKey := range p.list("DERP_TAILNET_API_KEY", p.APIKey) {
		if strings.HasPrefix(apiKey, "tskey-auth-") || strings.HasPrefix(apiKey, "tskey-client-") {
			p.fail("DERP_TAILNET_API_KEY", "want an API access token (tskey-api-…); an auth key adds devices and cannot list them, and an OAuth client goes into DERP_TAILNET_OAUTH_CLIENT_ID and _SECRET")
		}
		list = append(list, admit.TailnetConfig{APIKey: apiKey})
	}
	if len(ids) != len(secrets) {
		p.fail("DERP_TAILNET_OAUTH_CLIENT_SECRET", "want one secret for each of the %d of DERP_TAILNET_OAUTH_CLIENT_ID, got %d", len(ids), len(secrets))
		return
	}
	for i, id := range ids {
		list = append(list, admit.TailnetConfig{OAuthClientID: id, OAuthClientSecret: secrets[i]})
	}
	base, ok := httpURL(p.APIURL)
	if !ok {
		p.fail("DERP_TAILNET_API_URL", "want an http or https URL, got %q", admit.RedactURL(p.APIURL))
	}
	external := p.yes("DERP_TAILNET_EXTERNAL", p.External)
	switch {
	case len(list) == 0 && len(names) > 0:
		p.fail("DERP_TAILNET", "has no meaning without DERP_TAILNET_API_KEY or DERP_TAILNET_OAUTH_CLIENT_ID; set one of them, or remove it")
	case len(list) == 0 && external:
		p.fail("DERP_TAILNET_EXTERNAL", "has no meaning without DERP_TAILNET_API_KEY or DERP_TAILNET_OAUTH_CLIENT_ID; set one of them, or remove it")
	case len(names) > 0 && len(names) != len(list):
		p.fail("DERP_TAILNET", "want one name for each of the %d credentials, API keys first, or none; got %d", len(list), len(names))
		return
	}
	for i := range list {
		if len(names) > 0 {
			list[i].Tailnet = names[i]
		}
		list[i].BaseURL = base
		list[i].External = external
		list[i].Interval = c.verifyInterval
		list[i].Grace = c.grace
	}
	c.tailnets = list
}

// duration reads a time span of at least lowest.
func (p *parser) duration(name, value string, lowest time.Duration) time.Duration {
	d, err := time.ParseDuration(value)
	switch {
	case err != nil || d < 0:
		p.fail(name, "want a duration such as 24h, 5m or 30s, got %q", value)
	case d < lowest:
		p.fail(name, "want at least %s, got %q", lowest, value)
	}
	return d
}

// newGate is nil for an open relay.
func newGate(c *config, log zerolog.Logger) (*admit.Gate, error) {
	if c.open() {
		return nil, nil
	}
	var sources []admit.Source
	if c.keys != nil {
		sources = append(sources, admit.Keys(c.keys))
	}
	if c.keysFile != "" {
		source, err := admit.KeyFile(c.keysFile, log)
		if err != nil {
			return nil, fmt.Errorf("DERP_ALLOW_KEYS: %w", err)
		}
		sources = append(sources, source)
	}
	for _, tailnet := range c.tailnets {
		tailnet.Log = log
		source, err := admit.Tailnet(tailnet)
		if err != nil {
			return nil, fmt.Errorf("DERP_TAILNET: %w", err)
		}
		sources = append(sources, source)
	}
	for _, socket := range c.sockets {
		sources = append(sources, admit.Tailscaled(socket, c.grace))
	}
	for _, target := range c.verifyURLs {
		sources = append(sources, admit.URL(admit.URLConfig{Target: target, FailOpen: c.failOpen}))
	}
	return admit.NewGate(admit.Config{
		Sources:  sources,
		Grace:    c.grace,
		Path:     filepath.Join(c.dataDir, "admitted.json"),
		Interval: c.verifyInterval,
		Log:      log,
	}), nil
}

// admit is nil for an open relay.
func (n *node) admit() relay.AdmitFunc {
	if n.gate == nil {
		return nil
	}
	return func(ctx context.Context, node key.NodePublic, addr netip.Addr) error {
		if n.probe.has(node) {
			return nil
		}
		return n.gate.Admit(ctx, node, addr)
	}
}

// connected is whom the gate asks about again.
func (n *node) connected() map[key.NodePublic]netip.Addr {
	list := n.relay.Clients()
	maps.DeleteFunc(list, func(node key.NodePublic, _ netip.Addr) bool { return n.probe.has(node) })
	return list
}
