package certs

import (
	"context"
	"encoding/base64"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/libdns/acmedns"
	"github.com/libdns/alidns"
	"github.com/libdns/cloudflare"
	"github.com/libdns/desec"
	"github.com/libdns/digitalocean"
	"github.com/libdns/duckdns"
	"github.com/libdns/gandi"
	"github.com/libdns/godaddy"
	"github.com/libdns/libdns"
	"github.com/libdns/namecheap"
	"github.com/libdns/ovh"
	"github.com/libdns/porkbun"
	"github.com/libdns/rfc2136"
	"github.com/libdns/tencentcloud"
	"go.uber.org/zap"
)

// DNSConfig says how names are proven by DNS-01 (RFC 8555 §8.4).
type DNSConfig struct {
	Provider certmagic.DNSProvider

	// Resolvers (host:port) are asked for the zone of a name, and whether
	// the record is there. Without any, the system's are asked for the
	// zone, and the zone's own servers for the record.
	Resolvers []string

	// PropagationTimeout is how long to wait until the record is there; 0
	// does not look.
	PropagationTimeout time.Duration

	// Delegate is the name to which _acme-challenge of each name is a
	// CNAME, or empty. The records are then made there.
	Delegate string
}

// solver is DNS-01 as certmagic does it.
func (c *DNSConfig) solver(log *zap.Logger) *certmagic.DNS01Solver {
	timeout := c.PropagationTimeout
	if timeout == 0 {
		timeout = -1 // certmagic's 0 is its default
	}
	return &certmagic.DNS01Solver{DNSManager: certmagic.DNSManager{
		DNSProvider:        c.Provider,
		Resolvers:          c.Resolvers,
		PropagationTimeout: timeout,
		OverrideDomain:     c.Delegate,
		Logger:             log,
	}}
}

// DNSProvider is a DNS service in whose zones records can be made.
type DNSProvider struct {
	Name        string
	Credentials []Credential

	// Tag is the build tag without which the provider is left out of the
	// binary, for those that add megabytes to it; empty for the others.
	Tag string

	build func(v map[string]string) certmagic.DNSProvider // nil when left out
}

// Credential is one value that a provider wants.
type Credential struct {
	Field    string // in capitals, unique within its provider
	Required bool
	Secret   bool   // never to be shown
	Default  string // where it is not required

	English, Chinese string // what it means

	// Options are all values there are, where they can be listed. Want is
	// the rule in English for one that cannot, but can be told to be wrong
	// without asking anybody.
	Options []string
	Want    string
	valid   func(string) bool
}

// Valid reports whether the value is an option, or keeps to the rule.
func (c Credential) Valid(value string) bool {
	if c.Options != nil {
		return slices.Contains(c.Options, value)
	}
	return c.valid == nil || c.valid(value)
}

// Included reports whether the provider is in this binary.
func (p DNSProvider) Included() bool { return p.build != nil }

// New makes a provider from the values of its credentials, by field. They must
// be valid, and the provider included.
func (p DNSProvider) New(values map[string]string) certmagic.DNSProvider {
	filled := make(map[string]string)
	var hidden []string
	for _, c := range p.Credentials {
		value := values[c.Field]
		if value == "" {
			value = c.Default
		}
		filled[c.Field] = value
		if c.Secret && value != "" {
			for _, form := range []string{value, url.QueryEscape(value), url.PathEscape(value)} {
				hidden = append(hidden, form, "(secret)")
			}
		}
	}
	return &guarded{DNSProvider: p.build(filled), hide: strings.NewReplacer(hidden...)}
}

// guarded keeps secrets out of a provider's errors, which certmagic logs and
// health shows: some APIs take them in the URL, and net/http's errors hold it.
// It also lets one call in at a time: libdns wants providers to be safe for
// more, but alidns is not, and namecheap's API replaces the whole zone.
type guarded struct {
	certmagic.DNSProvider
	mu   sync.Mutex // held during a call
	hide *strings.Replacer
}

// AppendRecords implements [libdns.RecordAppender].
func (g *guarded) AppendRecords(ctx context.Context, zone string, records []libdns.Record) ([]libdns.Record, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	done, err := g.DNSProvider.AppendRecords(ctx, zone, records)
	return done, g.mask(err)
}

// DeleteRecords implements [libdns.RecordDeleter].
func (g *guarded) DeleteRecords(ctx context.Context, zone string, records []libdns.Record) ([]libdns.Record, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	done, err := g.DNSProvider.DeleteRecords(ctx, zone, records)
	return done, g.mask(err)
}

func (g *guarded) mask(err error) error {
	if err == nil {
		return nil
	}
	return maskedError{err, g.hide.Replace(err.Error())}
}

type maskedError struct {
	cause error
	text  string
}

// Error implements error.
func (e maskedError) Error() string { return e.text }

// Unwrap gives errors.Is the cause.
func (e maskedError) Unwrap() error { return e.cause }

// IsHostPort reports whether s is the address of a DNS server. Names of ports
// are refused, since the image has no list of them.
func IsHostPort(s string) bool {
	host, port, err := net.SplitHostPort(s)
	n, notNumber := strconv.ParseUint(port, 10, 16)
	return err == nil && host != "" && notNumber == nil && n != 0
}

func isBase64(s string) bool {
	_, err := base64.StdEncoding.DecodeString(s)
	return err == nil
}

func isURL(s string) bool {
	u, err := url.Parse(s)
	return err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != ""
}

func isIP(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}

// DNSProviders are the providers there are, in alphabetical order.
var DNSProviders = []DNSProvider{
	{
		Name: "acmedns",
		Credentials: []Credential{
			{Field: "SERVER_URL", Required: true, English: "URL of the acme-dns server", Chinese: "acme-dns 服务器的网址", Want: "an http or https URL", valid: isURL},
			{Field: "USERNAME", Required: true, English: "username from /register", Chinese: "/register 返回的 username"},
			{Field: "PASSWORD", Required: true, Secret: true, English: "password from /register", Chinese: "/register 返回的 password"},
			{Field: "SUBDOMAIN", Required: true, English: "subdomain from /register", Chinese: "/register 返回的 subdomain"},
		},
		build: func(v map[string]string) certmagic.DNSProvider {
			return &acmedns.Provider{ServerURL: strings.TrimSuffix(v["SERVER_URL"], "/"), Username: v["USERNAME"], Password: v["PASSWORD"], Subdomain: v["SUBDOMAIN"]}
		},
	},
	{
		Name: "alidns",
		Credentials: []Credential{
			{Field: "ACCESS_KEY_ID", Required: true, English: "AccessKey ID of a RAM user with AliyunDNSFullAccess", Chinese: "RAM 用户的 AccessKey ID，需要 AliyunDNSFullAccess 权限"},
			{Field: "ACCESS_KEY_SECRET", Required: true, Secret: true, English: "AccessKey secret", Chinese: "AccessKey Secret"},
			{Field: "SECURITY_TOKEN", Secret: true, English: "STS token, for temporary credentials", Chinese: "STS token，仅用于临时凭证"},
		},
		build: func(v map[string]string) certmagic.DNSProvider {
			return &alidns.Provider{CredentialInfo: alidns.CredentialInfo{AccessKeyID: v["ACCESS_KEY_ID"], AccessKeySecret: v["ACCESS_KEY_SECRET"], SecurityToken: v["SECURITY_TOKEN"]}}
		},
	},
	{
		Name: "cloudflare",
		Credentials: []Credential{
			{Field: "API_TOKEN", Required: true, Secret: true, English: "API token (not the global key) that may edit the zone's DNS", Chinese: "有权编辑该区域 DNS 的 API 令牌（不是 Global API Key）"},
			{Field: "ZONE_TOKEN", Secret: true, English: "API token that may read zones, if the first may not", Chinese: "有权读取区域的 API 令牌，在前一个令牌无此权限时使用"},
		},
		build: func(v map[string]string) certmagic.DNSProvider {
			return &cloudflare.Provider{APIToken: v["API_TOKEN"], ZoneToken: v["ZONE_TOKEN"]}
		},
	},
	{
		Name:        "desec",
		Credentials: []Credential{{Field: "TOKEN", Required: true, Secret: true, English: "token", Chinese: "令牌"}},
		build: func(v map[string]string) certmagic.DNSProvider {
			return &desec.Provider{Token: v["TOKEN"]}
		},
	},
	{
		Name:        "digitalocean",
		Credentials: []Credential{{Field: "API_TOKEN", Required: true, Secret: true, English: "personal access token", Chinese: "个人访问令牌"}},
		build: func(v map[string]string) certmagic.DNSProvider {
			return &digitalocean.Provider{APIToken: v["API_TOKEN"]}
		},
	},
	{
		Name:        "duckdns",
		Credentials: []Credential{{Field: "API_TOKEN", Required: true, Secret: true, English: "token of the account", Chinese: "账户的 token"}},
		build: func(v map[string]string) certmagic.DNSProvider {
			return &duckdns.Provider{APIToken: v["API_TOKEN"]}
		},
	},
	{
		Name:        "gandi",
		Credentials: []Credential{{Field: "API_TOKEN", Required: true, Secret: true, English: "personal access token", Chinese: "个人访问令牌"}},
		build: func(v map[string]string) certmagic.DNSProvider {
			return &gandi.Provider{BearerToken: v["API_TOKEN"]}
		},
	},
	{
		Name: "godaddy",
		Credentials: []Credential{
			{Field: "API_KEY", Required: true, English: "API key", Chinese: "API key"},
			{Field: "API_SECRET", Required: true, Secret: true, English: "API secret", Chinese: "API secret"},
		},
		build: func(v map[string]string) certmagic.DNSProvider {
			return &godaddy.Provider{APIToken: v["API_KEY"] + ":" + v["API_SECRET"]}
		},
	},
	{
		Name:        "hetzner",
		Credentials: []Credential{{Field: "API_TOKEN", Required: true, Secret: true, English: "API token of the Cloud console's project that holds the zone", Chinese: "该区域所在的 Cloud Console 项目的 API 令牌"}},
		Tag:         "hetzner",
		build:       newHetzner,
	},
	{
		Name: "namecheap",
		Credentials: []Credential{
			{Field: "API_USER", Required: true, English: "user name", Chinese: "用户名"},
			{Field: "API_KEY", Required: true, Secret: true, English: "API key", Chinese: "API key"},
			{Field: "CLIENT_IP", English: "address of this machine as allowed in Namecheap's console; without it, a public service is asked", Chinese: "本机在 Namecheap 控制台里登记的地址；不填则询问一个公共服务", Want: "an IP address", valid: isIP},
		},
		build: func(v map[string]string) certmagic.DNSProvider {
			return &namecheap.Provider{User: v["API_USER"], APIKey: v["API_KEY"], ClientIP: v["CLIENT_IP"]}
		},
	},
	{
		Name: "ovh",
		Credentials: []Credential{
			{Field: "ENDPOINT", Default: "ovh-eu", English: "ovh-eu, ovh-ca, ovh-us, kimsufi-eu, kimsufi-ca, soyoustart-eu or soyoustart-ca", Chinese: "ovh-eu、ovh-ca、ovh-us、kimsufi-eu、kimsufi-ca、soyoustart-eu 或 soyoustart-ca", Options: []string{"ovh-eu", "ovh-ca", "ovh-us", "kimsufi-eu", "kimsufi-ca", "soyoustart-eu", "soyoustart-ca"}},
			{Field: "APPLICATION_KEY", Required: true, English: "application key", Chinese: "application key"},
			{Field: "APPLICATION_SECRET", Required: true, Secret: true, English: "application secret", Chinese: "application secret"},
			{Field: "CONSUMER_KEY", Required: true, Secret: true, English: "consumer key", Chinese: "consumer key"},
		},
		build: func(v map[string]string) certmagic.DNSProvider {
			return &ovh.Provider{Endpoint: v["ENDPOINT"], ApplicationKey: v["APPLICATION_KEY"], ApplicationSecret: v["APPLICATION_SECRET"], ConsumerKey: v["CONSUMER_KEY"]}
		},
	},
	{
		Name: "porkbun",
		Credentials: []Credential{
			{Field: "API_KEY", Required: true, Secret: true, English: "API key; API access must be on for the domain", Chinese: "API key；该域名要打开 API 访问"},
			{Field: "API_SECRET_KEY", Required: true, Secret: true, English: "secret API key", Chinese: "secret API key"},
		},
		build: func(v map[string]string) certmagic.DNSProvider {
			return &porkbun.Provider{APIKey: v["API_KEY"], APISecretKey: v["API_SECRET_KEY"]}
		},
	},
	{
		Name: "rfc2136",
		Credentials: []Credential{
			{Field: "SERVER", Required: true, English: "the zone's primary server (BIND, Knot, PowerDNS and others), HOST:PORT, TCP", Chinese: "该区域的主服务器（BIND、Knot、PowerDNS 等），HOST:PORT，TCP", Want: "HOST:PORT", valid: IsHostPort},
			{Field: "KEY_NAME", Required: true, English: "name of the TSIG key", Chinese: "TSIG 密钥的名称"},
			{Field: "KEY_ALG", Default: "hmac-sha256", English: "algorithm of the TSIG key", Chinese: "TSIG 密钥的算法", Options: []string{"hmac-sha1", "hmac-sha224", "hmac-sha256", "hmac-sha384", "hmac-sha512"}},
			{Field: "KEY", Required: true, Secret: true, English: "the TSIG key, base64", Chinese: "TSIG 密钥，base64", Want: "base64", valid: isBase64},
		},
		build: func(v map[string]string) certmagic.DNSProvider {
			return &rfc2136.Provider{Server: v["SERVER"], KeyName: v["KEY_NAME"], KeyAlg: v["KEY_ALG"], Key: v["KEY"]}
		},
	},
	{
		Name: "route53",
		Credentials: []Credential{
			{Field: "ACCESS_KEY_ID", Required: true, English: "access key ID", Chinese: "access key ID"},
			{Field: "SECRET_ACCESS_KEY", Required: true, Secret: true, English: "secret access key", Chinese: "secret access key"},
			{Field: "SESSION_TOKEN", Secret: true, English: "session token, for temporary credentials", Chinese: "session token，仅用于临时凭证"},
			{Field: "REGION", Default: "us-east-1", English: "AWS region", Chinese: "AWS 区域"},
			{Field: "HOSTED_ZONE_ID", English: "hosted zone; without it, found by name", Chinese: "托管区域的 ID；不填则按名称查找"},
		},
		Tag:   "route53",
		build: newRoute53,
	},
	{
		Name: "tencentcloud",
		Credentials: []Credential{
			{Field: "SECRET_ID", Required: true, English: "SecretId of a CAM user with QcloudDNSPodFullAccess", Chinese: "CAM 子用户的 SecretId，需要 QcloudDNSPodFullAccess 权限"},
			{Field: "SECRET_KEY", Required: true, Secret: true, English: "SecretKey", Chinese: "SecretKey"},
			{Field: "SESSION_TOKEN", Secret: true, English: "session token, for temporary credentials", Chinese: "session token，仅用于临时凭证"},
		},
		build: func(v map[string]string) certmagic.DNSProvider {
			return &tencentcloud.Provider{SecretId: v["SECRET_ID"], SecretKey: v["SECRET_KEY"], SessionToken: v["SESSION_TOKEN"]}
		},
	},
}
