package certs

import (
	"cmp"
	"context"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/libdns/libdns"
	"go.uber.org/zap"
)

// DNSConfig configures DNS-01 (RFC 8555 §8.4).
type DNSConfig struct {
	Provider certmagic.DNSProvider

	// Resolvers (host:port) are the DNS servers that find the zone of a name
	// and check that the record is visible. If empty, the system's resolver
	// finds the zone, and the zone's own servers are checked for the record.
	Resolvers []string

	// PropagationTimeout limits the wait for the record to become visible.
	// 0 skips that check.
	PropagationTimeout time.Duration

	// Delegate is the name to which _acme-challenge of each name is a CNAME.
	// If it is set, records are made there.
	Delegate string
}

// solver returns certmagic's DNS-01 solver.
func (c *DNSConfig) solver(log *zap.Logger) *certmagic.DNS01Solver {
	timeout := c.PropagationTimeout
	if timeout == 0 {
		timeout = -1 // certmagic takes 0 for its default
	}
	return &certmagic.DNS01Solver{DNSManager: certmagic.DNSManager{
		DNSProvider:        c.Provider,
		Resolvers:          c.Resolvers,
		PropagationTimeout: timeout,
		OverrideDomain:     c.Delegate,
		Logger:             log,
	}}
}

// DNSProvider describes a DNS service. Each provider is one file, which
// registers it: its variables, and how libdns' provider is made of them.
type DNSProvider struct {
	// Name is the value of DERP_DNS_PROVIDER.
	Name string

	// Tag is the build tag that includes the provider in the binary. Only
	// providers that add megabytes to the binary have one.
	Tag string

	// Variables returns the provider's variables, all empty.
	Variables func() DNSVariables
}

// DNSVariables is a pointer to a struct of strings, one for each variable of a
// provider. Its tags are read by kelseyhightower/envconfig and by
// cmd/derpd/internal/config, where they are explained.
type DNSVariables interface {
	// provider makes libdns' provider. It returns nil if this build leaves
	// the provider out.
	provider() certmagic.DNSProvider
}

// Included reports whether this binary has the provider.
func (p DNSProvider) Included() bool { return p.Variables().provider() != nil }

var registered []DNSProvider

// registerDNS is called by the init function of each provider's file.
func registerDNS(p DNSProvider) { registered = append(registered, p) }

// DNSProviders lists the providers by name, with those that this build leaves
// out.
func DNSProviders() []DNSProvider {
	return slices.SortedFunc(slices.Values(registered), func(a, b DNSProvider) int { return cmp.Compare(a.Name, b.Name) })
}

// NewDNSProvider makes a provider of its variables, which must be valid. The
// provider must be included.
func NewDNSProvider(v DNSVariables) certmagic.DNSProvider {
	var pairs []string
	for _, secret := range secretsOf(v) {
		pairs = append(pairs, secret, "(secret)")
	}
	return &guarded{DNSProvider: v.provider(), hide: strings.NewReplacer(pairs...)}
}

// secretsOf returns the secrets as they may stand in a URL, the longest first:
// one secret may be the beginning of another.
func secretsOf(v DNSVariables) []string {
	var secrets []string
	fields := reflect.ValueOf(v).Elem()
	for i := range fields.NumField() {
		if value := fields.Field(i).String(); value != "" && fields.Type().Field(i).Tag.Get("secret") == "true" {
			secrets = append(secrets, value, url.QueryEscape(value), url.PathEscape(value))
		}
	}
	slices.SortFunc(secrets, func(a, b string) int { return len(b) - len(a) })
	return secrets
}

// guarded masks secrets in a provider's errors, which certmagic logs and health
// shows. Some APIs take secrets in the URL, and errors of net/http contain the
// URL. It also makes one call at a time: alidns is not safe for concurrent use,
// and namecheap's API replaces the whole zone.
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

// Unwrap returns the cause, for errors.Is.
func (e maskedError) Unwrap() error { return e.cause }
