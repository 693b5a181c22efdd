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

	// PropagationTimeout limits the wait for the record to become visible. 0
	// disables the check.
	PropagationTimeout time.Duration

	// Delegate is the target of the CNAME at _acme-challenge of each name. If
	// Delegate is set, records are created at that target.
	Delegate string
}

// solver returns certmagic's DNS-01 solver.
func (c *DNSConfig) solver(log *zap.Logger) *certmagic.DNS01Solver {
	timeout := c.PropagationTimeout
	if timeout == 0 {
		timeout = -1 // for certmagic, 0 means its default
	}
	return &certmagic.DNS01Solver{DNSManager: certmagic.DNSManager{
		DNSProvider:        c.Provider,
		Resolvers:          c.Resolvers,
		PropagationTimeout: timeout,
		OverrideDomain:     c.Delegate,
		Logger:             log,
	}}
}

// DNSProvider describes a DNS service. Each provider is one file. The file declares
// the variables, creates libdns' provider from them, and registers the provider.
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
// provider. kelseyhightower/envconfig and cmd/derpd/internal/config read the tags;
// the latter explains them.
type DNSVariables interface {
	// provider creates libdns' provider. It returns nil if this build lacks the
	// provider.
	provider() certmagic.DNSProvider
}

// Included reports whether this binary has the provider.
func (p DNSProvider) Included() bool { return p.Variables().provider() != nil }

var registered []DNSProvider

// registerDNS is called by the init function of each provider's file.
func registerDNS(p DNSProvider) { registered = append(registered, p) }

// DNSProviders lists all providers by name, including the providers that this build
// lacks.
func DNSProviders() []DNSProvider {
	return slices.SortedFunc(slices.Values(registered), func(a, b DNSProvider) int { return cmp.Compare(a.Name, b.Name) })
}

// NewDNSProvider creates a provider from its variables. The variables must be valid,
// and the provider included.
func NewDNSProvider(v DNSVariables) certmagic.DNSProvider {
	var pairs []string
	for _, secret := range secretsOf(v) {
		pairs = append(pairs, secret, "(secret)")
	}
	return &guarded{DNSProvider: v.provider(), hide: strings.NewReplacer(pairs...)}
}

// secretsOf returns the secrets, also in the encodings of a URL. The longest comes
// first, because one secret may be a prefix of another.
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
// shows. Some APIs have secrets in the URL, and errors of net/http contain the URL.
// guarded also serializes calls: alidns is not safe for concurrent use, and
// namecheap's API replaces the whole zone.
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
