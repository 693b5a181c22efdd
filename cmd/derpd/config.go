package main

import (
	"cmp"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/mail"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"derpd/certs"
	"derpd/relay"
	"derpd/relay/admit"
	"derpd/relay/derpmap"
)

// The TLS modes of DERP_CERT_MODE.
const (
	modeLetsEncrypt = "letsencrypt"
	modeManual      = "manual"
	modePinned      = "pinned"
	modeOff         = "off"
)

// config is the environment after validation: every value is typed, and every
// file it names was there and could be read.
type config struct {
	loaded *loaded

	domains []string // DNS names and addresses; the first is the HostName

	addr     string // HTTPS, host:port
	httpAddr string // plain HTTP, host:port; empty when off
	stunAddr string // UDP, host:port; empty when off
	admin    string // host:port
	health   string // host:port; empty when off

	congestion string // of clients' connections; empty for the kernel's

	dataDir, certDir string
	certDirUsable    bool

	mode     string
	manual   certs.ManualConfig
	pinned   certs.PinnedConfig
	acme     certs.ACMEConfig
	acmeHTTP bool // whether HTTP-01 may be used
	acmeTLS  bool // whether TLS-ALPN-01 may be used
	acmeDNS  bool // whether DNS-01 may be used

	sockets        []string // tailscaled sockets to ask
	verifyURLs     []string
	failOpen       bool // of the URLs
	keys           admit.KeySet
	keysFile       string // watched, instead of keys
	tailnets       []admit.TailnetConfig
	grace          time.Duration // how long a known node stays welcome
	verifyInterval time.Duration // between questions about connected nodes
	openOnOrder    bool          // DERP_VERIFY_CLIENTS=false, and no other source
	disallowApps   []string

	node       derpmap.Node // without what is only known when listening
	publicTLS  int          // 0: as listened
	publicHTTP int          // 0: as listened
	publicSTUN int          // 0: as listened
	discovery  []string     // STUN servers to ask for the public address

	mesh relay.MeshConfig // without Describe

	trustedProxies []netip.Prefix
	proxyProtocol  bool

	bootstrap []string
	home      http.Handler

	// gateways are of the container, and no variable sets them.
	gateways []netip.Addr

	logLevel  zerolog.Level
	logFormat string

	warnings []string
}

// publicSTUNServers are Tailscale's own, far apart, so that one of them is
// near enough to answer within discoveryTimeout.
var publicSTUNServers = []string{"derp1.tailscale.com:3478", "derp3.tailscale.com:3478", "derp4.tailscale.com:3478", "derp7.tailscale.com:3478"}

// nodeKeyFile holds the node key.
func (c *config) nodeKeyFile() string { return filepath.Join(c.dataDir, "node.key") }

// loadConfig reads and validates the whole environment. It changes nothing on
// disk and opens no socket. The error holds all problems, one to a line.
func loadConfig(pairs []string) (*config, error) {
	c, err := readConfig(pairs)
	if c.mode == modePinned && c.certDirUsable {
		if _, pinErr := certs.LoadPinned(c.pinned); pinErr != nil && !errors.Is(pinErr, fs.ErrNotExist) {
			err = errors.Join(err, fmt.Errorf("DERP_CERT_DIR: %w%s", pinErr, secretHint(pinErr)))
		}
	}
	return c, err
}

// readConfig is loadConfig without a look at the pinned certificate: what is
// wrong with that, `derpd pin --rotate` is there to mend.
func readConfig(pairs []string) (*config, error) {
	l, err := loadEnvironment(pairs)
	p := &parser{loaded: l}
	if err != nil {
		p.errs = append(p.errs, err)
	}
	c := &config{loaded: l}
	for _, name := range l.ignored {
		c.warnings = append(c.warnings, name+" looks injected by Docker or Kubernetes and is ignored")
	}
	if l.platform != nil {
		c.warnings = append(c.warnings, l.platform.warnings...)
		l.platform.reject(p)
	}
	p.addresses(c)
	p.kernel(c)
	p.directories(c)
	p.certificates(c)
	p.readOnly(c)
	p.admission(c)
	p.publicFace(c)
	p.mesh(c)
	p.proxies(c)
	p.rest(c)
	return c, errors.Join(p.errs...)
}

// parser collects problems while it turns strings into values.
type parser struct {
	*loaded
	errs []error

	unwritable []unwritable
}

// unwritable is a directory that can at most be read.
type unwritable struct {
	name string // of the variable
	err  error
}

func (p *parser) fail(name, format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf(name+": "+format, args...))
}

// list splits a comma-separated value. One that holds nothing but commas would
// quietly switch off what it is for, admission among others.
func (p *parser) list(name, value string) []string {
	items := splitList(value)
	if value != "" && len(items) == 0 {
		p.fail(name, "want a comma-separated list, got %q", value)
	}
	return items
}

func (p *parser) addresses(c *config) {
	for _, d := range p.list("DERP_DOMAIN", p.Domain) {
		if d, ok := p.domain(d); ok {
			if slices.Contains(c.domains, d) {
				p.fail("DERP_DOMAIN", "names %q twice", d)
			}
			c.domains = append(c.domains, d)
		}
	}
	c.addr = p.hostPort("DERP_ADDR", p.Addr)
	c.admin = p.hostPort("DERP_ADMIN_ADDR", p.Admin)
	if p.Health != "" {
		c.health = p.hostPort("DERP_HEALTH_ADDR", p.Health)
	}
	host, _, _ := net.SplitHostPort(c.addr)
	httpPort := p.HTTP
	if httpPort == "" {
		httpPort = "80"
		if p.CertMode == modeOff {
			httpPort = "-1" // what terminates TLS has port 80 too
		}
	}
	if n, ok := p.port("DERP_HTTP_PORT", httpPort, -1); ok && n != -1 {
		c.httpAddr = net.JoinHostPort(host, strconv.Itoa(n))
	}
	if p.yes("DERP_STUN", p.STUN) {
		stunHost := host
		if p.STUNIP != "" {
			stunHost = strings.Trim(p.STUNIP, "[]")
			if _, err := netip.ParseAddr(stunHost); err != nil && !isHostName(stunHost) {
				p.fail("DERP_STUN_ADDR", "want a host name or an address, without port, got %q", p.STUNIP)
			}
		}
		if n, ok := p.port("DERP_STUN_PORT", p.STUNUDP, 0); ok {
			c.stunAddr = net.JoinHostPort(stunHost, strconv.Itoa(n))
		}
	}
	p.distinct("DERP_HTTP_PORT", c.httpAddr, "DERP_ADDR", c.addr)
	p.distinct("DERP_ADMIN_ADDR", c.admin, "DERP_ADDR", c.addr)
	p.distinct("DERP_ADMIN_ADDR", c.admin, "DERP_HTTP_PORT", c.httpAddr)
	p.distinct("DERP_HEALTH_ADDR", c.health, "DERP_ADDR", c.addr)
	p.distinct("DERP_HEALTH_ADDR", c.health, "DERP_HTTP_PORT", c.httpAddr)
	p.distinct("DERP_HEALTH_ADDR", c.health, "DERP_ADMIN_ADDR", c.admin)
}

// congestionControls lists what the kernel has loaded. What it could load is
// not for a process without privileges to ask.
const congestionControls = "/proc/sys/net/ipv4/tcp_available_congestion_control"

func (p *parser) kernel(c *config) {
	if p.Congestion == "" {
		return
	}
	data, err := os.ReadFile(congestionControls)
	if err != nil {
		p.fail("DERP_TCP_CONGESTION", "%w", err)
		return
	}
	if available := strings.Fields(string(data)); !slices.Contains(available, p.Congestion) {
		p.fail("DERP_TCP_CONGESTION", "want one of what the kernel has loaded (%s), got %q; on the host: modprobe tcp_%s",
			strings.Join(available, ", "), p.Congestion, p.Congestion)
	}
	c.congestion = p.Congestion
}

// distinct refuses two TCP listeners on one port; 0 stands for any free one.
func (p *parser) distinct(name, addr, otherName, other string) {
	_, port, _ := net.SplitHostPort(addr)
	_, otherPort, _ := net.SplitHostPort(other)
	if port == otherPort && port != "" && port != "0" {
		p.fail(name, "port %s is taken by %s; want another", port, otherName)
	}
}

// isHostName reports whether s is labels of letters, digits and hyphens (RFC
// 1123 §2.1).
func isHostName(s string) bool { return isLabels(strings.TrimSuffix(s, "."), hostLabel) }

// isLabels reports whether s is labels of one kind, none longer than 63 bytes.
// To have that in the expressions made them the most of a start's work here.
func isLabels(s string, kind *regexp.Regexp) bool {
	for label := range strings.SplitSeq(s, ".") {
		if len(label) > 63 || !kind.MatchString(label) {
			return false
		}
	}
	return true
}

var (
	hostLabel   = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?$`)
	recordLabel = regexp.MustCompile(`^[a-zA-Z0-9_]([a-zA-Z0-9_-]*[a-zA-Z0-9])?$`)
)

// numeric matches what looks like an address that lacks a part: no top-level
// domain is a number (RFC 3696 §2).
var numeric = regexp.MustCompile(`(^|\.)[0-9]+\.?$`)

// domain normalises one entry of DERP_DOMAIN.
func (p *parser) domain(d string) (string, bool) {
	bare := strings.Trim(d, "[]")
	if addr, err := netip.ParseAddr(bare); err == nil {
		if addr.Zone() != "" || addr.IsUnspecified() || addr.IsMulticast() {
			p.fail("DERP_DOMAIN", "want an address that clients can dial, got %q", d)
			return "", false
		}
		return addr.Unmap().String(), true
	}
	switch {
	case strings.Contains(d, "://"):
		p.fail("DERP_DOMAIN", "want a name without a scheme, such as derp.example.com, got %q", d)
	case strings.HasPrefix(d, "*."):
		p.fail("DERP_DOMAIN", "want the one name that clients dial, not a wildcard, got %q", d)
	case strings.Contains(d, "/"):
		p.fail("DERP_DOMAIN", "want a name without a path, got %q", d)
	case strings.Contains(d, ":"):
		p.fail("DERP_DOMAIN", "want a name without a port, got %q; the port goes into DERP_ADDR, or DERP_PUBLIC_PORT behind a port mapping", d)
	case len(d) > 253 || !isHostName(d) || numeric.MatchString(d):
		p.fail("DERP_DOMAIN", "want DNS names (letters, digits, hyphens and dots; punycode for others) or addresses, got %q", d)
	default:
		return strings.ToLower(strings.TrimSuffix(d, ".")), true
	}
	return "", false
}

// hostPort checks a TCP listen address.
func (p *parser) hostPort(name, value string) string {
	host, port, err := net.SplitHostPort(value)
	if err != nil {
		p.fail(name, "want host:port or :port, got %q", value)
		return ""
	}
	if _, err := netip.ParseAddr(host); err != nil && host != "" && !isHostName(host) {
		p.fail(name, "want a host name or an address before the port, got %q", value)
		return ""
	}
	n, ok := p.port(name, port, 0)
	if !ok {
		return ""
	}
	return net.JoinHostPort(host, strconv.Itoa(n))
}

// port parses a port; lowest is what is allowed below 1: 0 for any free port,
// -1 for off.
func (p *parser) port(name, value string, lowest int) (int, bool) {
	n, err := strconv.Atoi(value)
	if err != nil || n < lowest || n > 65535 {
		off := ""
		if lowest == -1 {
			off = ", or -1 for off"
		}
		p.fail(name, "want a port from 1 to 65535%s, got %q", off, value)
		return 0, false
	}
	return n, true
}

func (p *parser) yes(name, value string) bool {
	b, err := strconv.ParseBool(strings.ToLower(value))
	if err != nil {
		p.fail(name, "want true or false, got %q", value)
	}
	return b
}

func (p *parser) directories(c *config) {
	c.dataDir, c.certDir = p.DataDir, filepath.Join(p.DataDir, "certs")
	usable := p.directory("DERP_DATA_DIR", c.dataDir)
	c.certDirUsable = usable
	if p.CertDir != "" {
		c.certDir = p.CertDir
		// Files that something else renews are only read.
		c.certDirUsable = p.CertMode != modeManual && p.directory("DERP_CERT_DIR", c.certDir)
	}
	if usable {
		if _, err := relay.LoadKey(c.nodeKeyFile()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			p.fail("DERP_DATA_DIR", "%w%s", err, secretHint(err))
		}
	}
}

// directory checks that path is a directory that can be written to, or that it
// can be made. What can only be read is for readOnly to judge.
func (p *parser) directory(name, path string) bool {
	existing := filepath.Clean(path)
	info, err := os.Stat(existing)
	for errors.Is(err, fs.ErrNotExist) {
		existing = filepath.Dir(existing)
		info, err = os.Stat(existing)
	}
	switch {
	case err != nil:
		p.fail(name, "%w", err)
	case !info.IsDir():
		p.fail(name, "want a directory, but %s is a file", existing)
	default:
		err := unix.Access(existing, unix.W_OK|unix.X_OK)
		if err == nil {
			return true
		}
		fix := fmt.Sprintf("on the host: chown -R %d DIRECTORY, or use a named volume", os.Getuid())
		if errors.Is(err, unix.EROFS) {
			fix = "mount it for writing"
		}
		p.unwritable = append(p.unwritable, unwritable{name, fmt.Errorf("%s: %s cannot be written to by uid %d: %w; %s", name, existing, os.Getuid(), err, fix)})
	}
	return false
}

// readOnly decides about directories that cannot be written to. Where all that
// the relay needs is there already, it serves with that: a volume that became
// read-only must not take down a relay which has a certificate.
func (p *parser) readOnly(c *config) {
	_, keyErr := relay.LoadKey(c.nodeKeyFile())
	for _, dir := range p.unwritable {
		ofData := dir.name == "DERP_DATA_DIR"
		ofCerts := c.certDirWritten() && (!ofData || p.CertDir == "")
		switch {
		case ofData && keyErr != nil, ofCerts && !c.certificateStored():
			p.errs = append(p.errs, dir.err)
		case ofCerts && c.mode == modeLetsEncrypt:
			c.warnings = append(c.warnings, dir.err.Error()+"; the stored certificate is served, but cannot be renewed")
		case ofCerts || ofData:
			c.warnings = append(c.warnings, dir.err.Error()+"; derpd works with what is there")
		}
	}
}

// certDirWritten reports whether derpd itself keeps certificates.
func (c *config) certDirWritten() bool { return c.mode == modePinned || c.mode == modeLetsEncrypt }

// certificateStored reports whether there is nothing to write to the
// certificate directory for now.
func (c *config) certificateStored() bool {
	if c.mode == modePinned {
		_, err := certs.LoadPinned(c.pinned)
		return err == nil
	}
	return c.acme.Stored()
}

func (p *parser) certificates(c *config) {
	c.mode = p.CertMode
	switch c.mode {
	case "":
		c.mode = modePinned
		if len(c.domains) > 0 && net.ParseIP(c.domains[0]) == nil {
			c.mode = modeLetsEncrypt
		}
	case "gcp":
		c.mode = modeLetsEncrypt
		if p.ACMECA != "" && p.ACMECA != "google" {
			p.fail("DERP_ACME_CA", "DERP_CERT_MODE=gcp means google, got %q; want DERP_CERT_MODE=letsencrypt", p.ACMECA)
		}
		p.ACMECA = "google"
	case modeLetsEncrypt, modeManual, modePinned, modeOff:
	default:
		p.fail("DERP_CERT_MODE", "want letsencrypt, manual, pinned, off or gcp, got %q", p.CertMode)
		return
	}
	if c.mode != modeManual {
		p.unwanted(c.mode, "DERP_CERT_FILE", "DERP_KEY_FILE")
	}
	if c.mode != modeLetsEncrypt {
		if p.MeshWith == "" {
			p.unwanted(c.mode, "DERP_ACME_CA_ROOTS")
		}
		p.unwanted(c.mode, "DERP_ACME_CA", "DERP_ACME_EMAIL", "DERP_ACME_EAB_KID", "DERP_ACME_EAB_KEY", "DERP_ACME_CHALLENGES",
			"DERP_DNS_PROVIDER", "DERP_DNS_RESOLVERS", "DERP_DNS_PROPAGATION_TIMEOUT", "DERP_DNS_DELEGATE")
		for _, v := range credentialVariables() {
			p.unwanted(c.mode, v.name)
		}
	}
	if p.ACMERoots != "" {
		p.roots(c)
	}
	c.pinned = certs.PinnedConfig{Path: filepath.Join(c.certDir, "pinned.pem"), Names: c.domains}
	switch c.mode {
	case modeLetsEncrypt:
		p.acme(c)
	case modeManual:
		p.manual(c)
	}
}

// unwanted refuses variables that have no meaning in a mode: whoever set them
// expects another one.
func (p *parser) unwanted(mode string, names ...string) {
	for _, name := range names {
		if p.given[name] {
			p.fail(name, "has no meaning when DERP_CERT_MODE is %s; remove one of them", mode)
		}
	}
}

// roots reads the private authority. What it signs may be a certificate of
// another node of the mesh, beside those that the system trusts.
func (p *parser) roots(c *config) {
	data, err := os.ReadFile(p.ACMERoots)
	if err != nil {
		p.fail("DERP_ACME_CA_ROOTS", "%w%s", err, secretHint(err))
		return
	}
	c.acme.Roots = x509.NewCertPool()
	if !c.acme.Roots.AppendCertsFromPEM(data) {
		p.fail("DERP_ACME_CA_ROOTS", "want a file of PEM certificates, but %s holds none", p.ACMERoots)
		return
	}
	if c.mesh.Roots, err = x509.SystemCertPool(); err != nil {
		c.mesh.Roots = x509.NewCertPool()
	}
	c.mesh.Roots.AppendCertsFromPEM(data)
}

func (p *parser) acme(c *config) {
	if len(c.domains) == 0 && p.Domain == "" {
		p.fail("DERP_DOMAIN", "want the name that the certificate is for, since DERP_CERT_MODE is letsencrypt; got nothing")
	}
	c.acme.Names, c.acme.Dir, c.acme.Email = c.domains, c.certDir, p.ACMEEmail
	c.acme.EABKeyID, c.acme.EABKey = p.ACMEKeyID, p.ACMEKey

	name := p.ACMECA
	if name == "" {
		name = "letsencrypt"
	}
	if directory, ok := certs.Directories[name]; ok {
		c.acme.Directory = directory
	} else if u, err := url.Parse(name); err == nil && u.Scheme == "https" && u.Host != "" {
		c.acme.Directory = name
	} else {
		p.fail("DERP_ACME_CA", "want letsencrypt, letsencrypt-staging, zerossl, google or the https URL of an ACME directory, got %q", name)
	}
	if p.ACMEEmail != "" {
		if _, err := mail.ParseAddress(p.ACMEEmail); err != nil {
			p.fail("DERP_ACME_EMAIL", "want an e-mail address, got %q", p.ACMEEmail)
		}
	}
	switch {
	case p.ACMEKeyID != "" && p.ACMEKey == "":
		p.fail("DERP_ACME_EAB_KEY", "want the key that belongs to DERP_ACME_EAB_KID, got nothing")
	case p.ACMEKeyID == "" && p.ACMEKey != "":
		p.fail("DERP_ACME_EAB_KID", "want the ID that belongs to DERP_ACME_EAB_KEY, got nothing")
	case p.ACMEKeyID == "" && name == "google":
		p.fail("DERP_ACME_EAB_KID", "Google's authority wants an external account binding; make one with `gcloud publicca external-account-keys create`")
	case p.ACMEKey != "":
		if key, ok := eabKey(p.ACMEKey); ok {
			c.acme.EABKey = key
		} else {
			p.fail("DERP_ACME_EAB_KEY", "want base64, got something else")
		}
	}
	p.challenges(c)
	p.dns(c)
}

// challenges is DERP_ACME_CHALLENGES, or what it is when it is not set.
func (l *loaded) challenges() string {
	if l.Challenges == "" && l.DNS != "" {
		return "dns"
	}
	return cmp.Or(l.Challenges, "http,tls-alpn")
}

func (p *parser) challenges(c *config) {
	for _, challenge := range p.list("DERP_ACME_CHALLENGES", p.loaded.challenges()) {
		switch challenge {
		case "http":
			c.acmeHTTP = true
		case "tls-alpn":
			c.acmeTLS = true
		case "dns":
			c.acmeDNS = true
		default:
			p.fail("DERP_ACME_CHALLENGES", "want http, tls-alpn, dns or several of them, got %q", challenge)
		}
	}
	if c.acmeHTTP && !c.acmeTLS && c.httpAddr == "" {
		p.fail("DERP_ACME_CHALLENGES", "http needs the plain HTTP listener, but DERP_HTTP_PORT is -1")
	}
	if !c.acmeDNS || c.acmeHTTP || c.acmeTLS {
		return
	}
	for _, name := range c.domains {
		if net.ParseIP(name) != nil {
			p.fail("DERP_DOMAIN", "want names alone, since DNS cannot prove an address (RFC 8738), got %q; add http or tls-alpn to DERP_ACME_CHALLENGES, or leave the address out", name)
		}
	}
}

// dns reads what DNS-01 wants.
func (p *parser) dns(c *config) {
	switch {
	case p.DNS == "":
		if c.acmeDNS {
			p.fail("DERP_ACME_CHALLENGES", "dns needs the provider of the domain's DNS: set DERP_DNS_PROVIDER")
		}
		for _, name := range []string{"DERP_DNS_RESOLVERS", "DERP_DNS_PROPAGATION_TIMEOUT", "DERP_DNS_DELEGATE"} {
			if p.given[name] {
				p.fail(name, "has no meaning without DERP_DNS_PROVIDER; set that, or remove this")
			}
		}
	case !c.acmeDNS:
		p.fail("DERP_DNS_PROVIDER", "has no meaning when DERP_ACME_CHALLENGES is %s; add dns there, or remove one of them", p.Challenges)
	}
	config := &certs.DNSConfig{Resolvers: p.list("DERP_DNS_RESOLVERS", p.DNSResolvers), Delegate: strings.TrimSuffix(p.DNSDelegate, ".")}
	config.Provider = p.dnsProvider()
	for _, server := range config.Resolvers {
		if !certs.IsHostPort(server) {
			p.fail("DERP_DNS_RESOLVERS", "want DNS servers as HOST:PORT, comma-separated, got %q", server)
		}
	}
	var err error
	if config.PropagationTimeout, err = time.ParseDuration(p.DNSTimeout); err != nil || config.PropagationTimeout < 0 {
		p.fail("DERP_DNS_PROPAGATION_TIMEOUT", "want a duration such as 2m or 90s, got %q", p.DNSTimeout)
	}
	if config.Delegate != "" && !isRecordName(config.Delegate) {
		p.fail("DERP_DNS_DELEGATE", "want the DNS name to which _acme-challenge of each domain is a CNAME, got %q", p.DNSDelegate)
	}
	if c.acmeDNS {
		c.acme.DNS = config
	}
}

// isRecordName reports whether s is a name of several labels, which may have
// the underscores of names of records, but for the last.
func isRecordName(s string) bool {
	last := strings.LastIndex(s, ".")
	return last >= 0 && isLabels(s[:last], recordLabel) && isLabels(s[last+1:], hostLabel)
}

// dnsProvider makes the provider, or nil if something is missing. Credentials
// of another one are refused: whoever set them expects that one to be used.
func (p *parser) dnsProvider() certmagic.DNSProvider {
	chosen := slices.IndexFunc(certs.DNSProviders, func(d certs.DNSProvider) bool { return d.Name == p.DNS })
	if chosen == -1 && p.DNS != "" {
		p.fail("DERP_DNS_PROVIDER", "want %s, got %q", providerNames(), p.DNS)
		return nil
	}
	for _, v := range credentialVariables() {
		switch {
		case !p.given[v.name] || v.provider == p.DNS:
		case p.DNS == "":
			p.fail(v.name, "has no meaning without DERP_DNS_PROVIDER=%s; set that, or remove this", v.provider)
		default:
			p.fail(v.name, "has no meaning when DERP_DNS_PROVIDER is %s; remove one of them", p.DNS)
		}
	}
	if chosen == -1 {
		return nil
	}
	provider := certs.DNSProviders[chosen]
	if !provider.Included() {
		p.fail("DERP_DNS_PROVIDER", "%s is not in this build, since it adds megabytes; build derpd with `-tags %s`", provider.Name, provider.Tag)
		return nil
	}
	values := make(map[string]string)
	before := len(p.errs)
	for _, credential := range provider.Credentials {
		name := credentialName(provider.Name, credential.Field)
		value := p.credentials[name]
		values[credential.Field] = value
		want := credential.Want
		if credential.Options != nil {
			want = either(credential.Options)
		}
		_, unreadable := p.fromFile[name] // and then already reported
		switch {
		case value == "" && credential.Required && !unreadable:
			p.fail(name, "want a value (%s), since DERP_DNS_PROVIDER is %s; got nothing", credential.English, provider.Name)
		case value == "" || credential.Valid(value):
		case credential.Secret:
			p.fail(name, "want %s, got something else", want)
		default:
			p.fail(name, "want %s, got %q", want, value)
		}
	}
	if len(p.errs) > before {
		return nil
	}
	return provider.New(values)
}

// providerNames lists the DNS providers, for a message.
func providerNames() string {
	var names []string
	for _, d := range certs.DNSProviders {
		names = append(names, d.Name)
	}
	return either(names)
}

func either(words []string) string {
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// eabKey brings a MAC key into the base64url form that RFC 8555 wants; some
// authorities hand out the padded standard form.
func eabKey(s string) (string, bool) {
	if _, err := base64.RawURLEncoding.DecodeString(s); err == nil {
		return s, true
	}
	for _, enc := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding, base64.RawStdEncoding} {
		if raw, err := enc.DecodeString(s); err == nil {
			return base64.RawURLEncoding.EncodeToString(raw), true
		}
	}
	return "", false
}

// unsafeFileName is what derper leaves out of a file name (cmd/derper/cert.go).
var unsafeFileName = regexp.MustCompile(`[^a-zA-Z0-9-.]`)

func (p *parser) manual(c *config) {
	certFile, keyFile := p.CertFile, p.KeyFile
	if (certFile == "") != (keyFile == "") {
		p.fail("DERP_CERT_FILE", "want DERP_CERT_FILE and DERP_KEY_FILE together, got one of them")
		return
	}
	if certFile == "" {
		if len(c.domains) == 0 {
			if p.Domain == "" {
				p.fail("DERP_DOMAIN", "want the name that the certificate is for, since DERP_CERT_MODE is manual; got nothing")
			}
			return
		}
		base := filepath.Join(c.certDir, unsafeFileName.ReplaceAllString(c.domains[0], ""))
		certFile, keyFile = base+".crt", base+".key"
		// derper makes a self-signed certificate in this one case. Ours is
		// the pinned one.
		if _, err := os.Stat(certFile); errors.Is(err, fs.ErrNotExist) && net.ParseIP(c.domains[0]) != nil {
			c.mode = modePinned
			if p.CertDir != "" {
				c.certDirUsable = p.directory("DERP_CERT_DIR", c.certDir)
			}
			c.warnings = append(c.warnings, "DERP_CERT_MODE is manual, DERP_DOMAIN is an address and "+certFile+" is not there: using a pinned certificate, as with DERP_CERT_MODE=pinned")
			return
		}
	}
	c.manual = certs.ManualConfig{CertFile: certFile, KeyFile: keyFile, Names: c.domains}
	if _, err := certs.LoadManual(c.manual); err != nil {
		p.fail("DERP_CERT_FILE", "%w%s", err, secretHint(err))
	}
}

var regionCode = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]*$`)

func (p *parser) publicFace(c *config) {
	id, err := strconv.Atoi(p.RegionID)
	if err != nil || id < 900 || id > 999 {
		p.fail("DERP_REGION_ID", "want a number from 900 to 999 (the others are Tailscale's), got %q", p.RegionID)
	}
	c.node = derpmap.Node{RegionID: id, RegionCode: p.RegionCode, RegionName: p.RegionName, Name: p.NodeName}
	if !regionCode.MatchString(p.RegionCode) {
		p.fail("DERP_REGION_CODE", "want letters, digits, dots, underscores and hyphens, got %q", p.RegionCode)
	}
	if p.NodeName == "" {
		c.node.Name = derpmap.DefaultNodeName(id)
	} else if !regionCode.MatchString(p.NodeName) {
		p.fail("DERP_NODE_NAME", "want letters, digits, dots, underscores and hyphens, got %q", p.NodeName)
	}
	c.node.IPv4 = p.publicAddress("DERP_PUBLIC_IPV4", "IPv4", p.PublicV4, netip.Addr.Is4)
	c.node.IPv6 = p.publicAddress("DERP_PUBLIC_IPV6", "IPv6", p.PublicV6, netip.Addr.Is6)
	if c.node.IPv4 == derpmap.None && c.node.IPv6 == derpmap.None && p.Domain == "" {
		p.fail("DERP_PUBLIC_IPV4", "none here and for DERP_PUBLIC_IPV6 leaves clients nothing to dial; set one of them, or DERP_DOMAIN")
	}
	if p.PublicTLS != "" {
		c.publicTLS, _ = p.port("DERP_PUBLIC_PORT", p.PublicTLS, 1)
	} else if c.mode == modeOff {
		c.publicTLS = 443
	}
	if p.PublicHTTP != "" {
		c.publicHTTP, _ = p.port("DERP_PUBLIC_HTTP_PORT", p.PublicHTTP, 1)
	}
	if p.PublicSTUN != "" {
		c.publicSTUN, _ = p.port("DERP_PUBLIC_STUN_PORT", p.PublicSTUN, -1)
	}
	switch p.Discovery {
	case "stun":
		c.discovery = publicSTUNServers
	case "off":
	default:
		c.discovery = p.list("DERP_DISCOVERY", p.Discovery)
		for _, server := range c.discovery {
			if host, port, err := net.SplitHostPort(server); err != nil || host == "" || port == "" {
				p.fail("DERP_DISCOVERY", "want stun, off or STUN servers as HOST:PORT, got %q", server)
			}
		}
	}
}

func (p *parser) publicAddress(name, family, value string, is func(netip.Addr) bool) string {
	if value == "" || value == derpmap.None {
		return value
	}
	addr, err := netip.ParseAddr(value)
	if err != nil || !is(addr) || addr.Is4In6() || addr.IsUnspecified() || addr.Zone() != "" {
		p.fail(name, "want an %s address or none, got %q", family, value)
		return ""
	}
	return addr.String()
}

// proxies reads who may tell the address of a client.
func (p *parser) proxies(c *config) {
	for _, value := range p.list("DERP_TRUSTED_PROXIES", p.Trusted) {
		network, err := netip.ParsePrefix(value)
		if addr, addrErr := netip.ParseAddr(value); addrErr == nil && addr.Zone() == "" {
			network, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		switch {
		case err != nil || network.Addr().Is4In6():
			p.fail("DERP_TRUSTED_PROXIES", "want addresses or networks such as 10.0.0.5 or 10.0.0.0/24, comma-separated, got %q", value)
		case network.Bits() == 0:
			p.fail("DERP_TRUSTED_PROXIES", "%s is everybody, and then anybody may tell any address; want the addresses of your proxies", value)
		case network != network.Masked():
			p.fail("DERP_TRUSTED_PROXIES", "want an address without a mask, or the network %s, got %q", network.Masked(), value)
		default:
			c.trustedProxies = append(c.trustedProxies, network)
		}
	}
	c.proxyProtocol = p.yes("DERP_PROXY_PROTOCOL", p.Proxied)
	switch {
	case c.proxyProtocol && p.Trusted == "":
		p.fail("DERP_PROXY_PROTOCOL", "believes nobody without DERP_TRUSTED_PROXIES; set that to the addresses of your proxies, or remove this")
	case !c.proxyProtocol && p.Trusted != "" && c.mode != modeOff:
		c.warnings = append(c.warnings, "DERP_TRUSTED_PROXIES without DERP_PROXY_PROTOCOL is for proxies that end TLS and set X-Forwarded-For; through one that passes TLS on, clients can tell any address")
	}
}

func (p *parser) rest(c *config) {
	for _, name := range p.list("DERP_BOOTSTRAP_DNS", p.Bootstrap) {
		if !isHostName(name) {
			p.fail("DERP_BOOTSTRAP_DNS", "want DNS names, got %q", name)
		}
		c.bootstrap = append(c.bootstrap, name)
	}
	home, err := relay.Home(p.Home)
	if err != nil {
		p.fail("DERP_HOME", "%w", err)
	}
	c.home = home
	switch p.LogLevel {
	case "debug", "info", "warn", "error":
		c.logLevel, _ = zerolog.ParseLevel(p.LogLevel)
	default:
		p.fail("DERP_LOG_LEVEL", "want debug, info, warn or error, got %q", p.LogLevel)
	}
	switch p.LogFormat {
	case "", "json", "console":
		c.logFormat = p.LogFormat
	default:
		p.fail("DERP_LOG_FORMAT", "want json or console, got %q", p.LogFormat)
	}
}
