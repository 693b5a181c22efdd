// Package config turns the environment into a typed, valid configuration.
//
// Each section is one file: its variables (a struct of strings, whose name ends
// in Env), its parser, and the typed result. A parser takes what it needs and
// returns a value, so that the order of the sections shows in [Load]:
//
//	names.go        DERP_DOMAIN
//	listen.go       listeners and sockets
//	storage.go      directories
//	certificate.go  DERP_CERT_MODE and certificates from files
//	acme.go         ACME
//	dns.go          DNS-01; each DNS provider is a file of package certs
//	roots.go        roots of private authorities
//	admission.go    what all sources of admission share, and the list of sources
//	keys.go         the sources, one file each: keys.go, tailnet.go,
//	                tailscaled.go and url.go
//	tell.go         DERP_TELL_CLIENTS
//	nodelimits.go   limits of one node
//	region.go       this node in the DERP map
//	mesh.go         the other nodes of the region
//	proxies.go      proxies in front of derpd
//	connlimits.go   limits of connections
//	web.go          what browsers and bootstrap clients get
//	updates.go      the search for newer releases
//	log.go          logging
//
// The other files serve all sections:
//
//	environ.go      reads the environment
//	bare.go         refuses values in quotes and with blanks
//	variables.go    lists the variables, and suggestion.go finds the nearest name
//	docs.go         prints the variables, and makedocs writes them into files
//	values.go       parses common types
//	problems.go     collects errors
//	platform.go     supplies the defaults of a cloud (fly.go, railway.go)
//
// A new variable is a field in the struct of its section, a line in the parser,
// and a field in the result. The second file to change is the one that uses the
// result, mostly in package node. `make docs` writes the documentation.
//
// A new source of admission is a file here (see url.go) and a file of package
// relay/admit. A new DNS provider is a file of package certs (see dns_gandi.go).
//
// A field has these tags:
//
//	envconfig  name of the variable, in full
//	default    value when it is not set
//	desc, zh   meaning, in English and in Chinese
//	or, zhor   how the default is found, where it is not one value
//	secret     "true" hides the value; "url" hides the parts of a URL that may be secret
//	lines      "true" if the value may have several lines
//
// Fields of DNS providers also have:
//
//	optional   "true" if the provider works without the variable
//	options    all possible values, comma-separated
//	is         the rule for the value; see rules in dns.go
//
// All fields are strings: envconfig stops at the first value that it cannot
// convert, and prints it, but derpd reports all problems and no secret.
package config

import (
	"cmp"
	"errors"
	"io/fs"
	"net/netip"
	"slices"

	"derpd/certs"
	"derpd/relay"
)

// Config is the environment after validation. Every file that it names existed
// and could be read.
type Config struct {
	Domains     []string // DNS names and addresses; the first is the HostName in the map
	Listen      Listen
	Storage     Storage
	Certificate Certificate
	Roots       Roots
	Admission   Admission
	Sources     []Source // of admission; an open relay has none
	Later       []Source // of admission, that close an open relay when their Target appears
	TellClients bool     // whether clients get reasons and warnings
	NodeLimits  NodeLimits
	Region      Region
	Mesh        relay.MeshConfig // without Describe
	Proxies     Proxies
	Limits      relay.Limits // without Shared
	Web         Web
	Updates     Updates
	Log         Log
	Platform    Platform
	Warnings    []string

	environment *environment
	computed    map[string]string // values of computed defaults, by variable; nil if there are problems
}

// Load reads and validates the environment, which is a list of NAME=value. It
// opens no socket and changes nothing on disk. The error holds all problems, one
// to a line; the configuration is then only good for [Config.WriteEffective].
func Load(environ []string) (*Config, error) {
	return load(environ, true)
}

// LoadForPin is Load without the check of the pinned certificate. `derpd pin
// --rotate` replaces a certificate that is lost, damaged or expired.
func LoadForPin(environ []string) (*Config, error) {
	return load(environ, false)
}

// AdminAddr returns DERP_ADMIN_ADDR alone. Commands that ask the running relay
// need nothing else, and the relay reports the other problems itself. The error
// also holds what could not be read; the address is the best that is known.
func AdminAddr(environ []string) (string, error) {
	p := new(problems)
	e := readEnvironment(environ, p)
	p.hostPort("DERP_ADMIN_ADDR", e.Admin)
	return e.Admin, p.err(e.order)
}

func load(environ []string, checkPin bool) (*Config, error) {
	p := new(problems)
	e := readEnvironment(environ, p)
	c := &Config{environment: e}

	c.Platform = e.parsePlatform(p)
	c.Domains = parseNames(p, e.NamesEnv)
	c.Listen = parseListen(p, e.ListenEnv, e.Mode == ModeOff)
	c.Storage = parseStorage(p, e.StorageEnv)
	var fallback string
	roots := parseRoots(p, e)
	c.Roots = roots.own
	c.Certificate, fallback = parseCertificate(p, e.CertificateEnv, c.Domains, c.Storage, c.Roots)
	if c.Certificate.Mode == ModeLetsEncrypt {
		c.Certificate.ACME, c.Certificate.Challenges = parseACME(p, e, c.Domains, c.Listen, c.Storage, roots)
	}
	refuseUnused(p, e, c.Certificate.Mode)
	storageWarnings := checkStorage(p, c.Storage, c.Certificate, e.CertDir != "", checkPin)
	var admissionWarnings []string
	c.Admission, c.Sources, c.Later, admissionWarnings = parseAdmission(p, e, roots)
	c.TellClients = p.boolean("DERP_TELL_CLIENTS", e.TellClients)
	var nodeLimitWarnings []string
	c.NodeLimits, nodeLimitWarnings = parseNodeLimits(p, e, slices.Concat(c.Sources, c.Later))
	c.Region = parseRegion(p, e.RegionEnv, e.Domain != "", c.Certificate.Mode)
	c.Mesh = parseMesh(p, e.MeshEnv, c.selfAddresses(), roots)
	var proxyWarnings []string
	c.Proxies, proxyWarnings = parseProxies(p, e.ProxiesEnv, c.Certificate.Mode)
	var limitWarnings []string
	c.Limits, limitWarnings = parseLimits(p, e.LimitsEnv, thisMachine())
	c.Web = parseWeb(p, e.WebEnv)
	c.Updates = parseUpdates(p, e.UpdatesEnv, environ)
	c.Log = parseLog(p, e.LogEnv)

	c.Warnings = slices.Concat(e.warnings(), c.Platform.warnings, optional(fallback), storageWarnings, admissionWarnings, nodeLimitWarnings, proxyWarnings, limitWarnings)
	err := p.err(e.order)
	if err == nil {
		c.computed = c.computedDefaults()
	}
	return c, err
}

func optional(s string) []string {
	if s == "" {
		return nil
	}
	return []string{s}
}

// Open reports whether anybody may use the relay when it starts.
func (c *Config) Open() bool { return len(c.Sources) == 0 }

// Meshed reports whether this node is one of several.
func (c *Config) Meshed() bool { return !c.Mesh.Key.IsZero() }

// PublicHTTPSPort is the port that clients dial; listening is the port of the
// HTTPS listener.
func (c *Config) PublicHTTPSPort(listening int) int { return cmp.Or(c.Region.HTTPSPort, listening) }

// NeedsDiscovery reports whether the public address must be found. With a
// domain, clients find the relay through DNS.
func (c *Config) NeedsDiscovery() bool {
	return len(c.Domains) == 0 && (c.Region.Node.IPv4 == "" || c.Region.Node.IPv6 == "")
}

// Names are all names and addresses of this node, configured or found. A found
// address that is not valid is left out.
func (c *Config) Names(found ...netip.Addr) []string {
	candidates := []string{c.Region.Node.IPv4, c.Region.Node.IPv6}
	for _, addr := range found {
		candidates = append(candidates, addr.String())
	}
	list := slices.Clone(c.Domains)
	for _, s := range candidates {
		if _, err := netip.ParseAddr(s); err == nil && !slices.Contains(list, s) {
			list = append(list, s)
		}
	}
	return list
}

// selfAddresses are what clients dial to reach this node.
func (c *Config) selfAddresses() self {
	return self{
		names: append(slices.Clone(c.Domains), c.Region.Node.IPv4, c.Region.Node.IPv6),
		port:  c.PublicHTTPSPort(PortOf(c.Listen.HTTPS)),
	}
}

// checkPinned reports a pinned certificate that is lost, damaged or expired.
func checkPinned(p *problems, pinned certs.PinnedConfig) {
	if _, err := certs.LoadPinned(pinned); err != nil && !errors.Is(err, fs.ErrNotExist) {
		p.add("DERP_CERT_DIR", "%w%s", err, readHint(err))
	}
}
