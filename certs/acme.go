package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/mholt/acmez/v3/acme"
	"github.com/rs/zerolog"
)

// Directories are the certificate authorities known by name.
var Directories = map[string]string{
	"letsencrypt":         certmagic.LetsEncryptProductionCA,
	"letsencrypt-staging": certmagic.LetsEncryptStagingCA,
	"zerossl":             certmagic.ZeroSSLProductionCA,
	"google":              certmagic.GoogleTrustProductionCA,
}

// shortlived is the certificate profile under which authorities sign IP
// addresses (RFC 8738; Let's Encrypt's profiles).
const shortlived = "shortlived"

// stopWithin bounds the wait for certmagic at the stop.
const stopWithin = 300 * time.Millisecond

// ACMEConfig says what to obtain, from whom, and how to prove it (RFC 8555).
type ACMEConfig struct {
	// Names are DNS names and IP addresses. The first is served to clients
	// that send no SNI.
	Names []string

	Directory string         // URL of the authority's directory
	Roots     *x509.CertPool // that the authority's own server chains to; nil for the system's
	Email     string

	// EABKeyID and EABKey bind the account to one that the authority
	// knows by other means (RFC 8555 §7.3.4).
	EABKeyID, EABKey string

	// ListenHost, HTTPPort and TLSPort are where the relay already listens:
	// the challenges are answered there and nothing else is bound. A port
	// of 0 leaves its challenge out (HTTP-01, TLS-ALPN-01).
	ListenHost        string
	HTTPPort, TLSPort int

	// DNS proves names by DNS-01, nil if it may not. What the listeners
	// can prove is then asked for only after DNS-01 has failed, and for
	// addresses, which DNS cannot prove (RFC 8738 §7).
	DNS *DNSConfig

	Dir string // where accounts, keys and certificates are kept
	Log zerolog.Logger
}

// ACME obtains and renews certificates with certmagic.
type ACME struct {
	config ACMEConfig
	ready  chan struct{}
	once   sync.Once                  // closes ready
	state  atomic.Pointer[acmeState]  // nil until Run
	err    atomic.Pointer[errorValue] // of the last attempt
}

type errorValue struct{ error }

// acmeState is what certmagic keeps while it runs. Its configurations share
// one cache, so each of them serves all certificates.
type acmeState struct {
	cache   *certmagic.Cache
	config  *certmagic.Config // of the first name
	issuers []*certmagic.ACMEIssuer
}

// NewACME returns a manager that obtains nothing until Run.
func NewACME(c ACMEConfig) *ACME {
	return &ACME{config: c, ready: make(chan struct{})}
}

// Run implements [Manager]. A failing authority is asked again with growing
// pauses (certmagic's, up to hours, for weeks); it never ends Run.
func (a *ACME) Run(ctx context.Context) error {
	names, addresses := split(a.config.Names)
	logger := zapLogger(a.config.Log)

	var byName map[string]*certmagic.Config
	cache := certmagic.NewCache(certmagic.CacheOptions{
		GetConfigForCert: func(c certmagic.Certificate) (*certmagic.Config, error) {
			for _, name := range c.Names {
				if config, ok := byName[name]; ok {
					return config, nil
				}
			}
			return byName[a.config.Names[0]], nil
		},
		Logger: logger,
	})
	defer stopCache(cache)

	state := &acmeState{cache: cache}
	byName = make(map[string]*certmagic.Config)
	for profile, subjects := range map[string][]string{"": names, shortlived: addresses} {
		if len(subjects) == 0 {
			continue
		}
		config := certmagic.New(cache, certmagic.Config{
			Storage:           &certmagic.FileStorage{Path: a.config.Dir},
			DefaultServerName: a.config.Names[0],
			KeySource:         certmagic.StandardKeyGenerator{KeyType: certmagic.P256},
			OnEvent:           a.onEvent,
			Logger:            logger,
		})
		config.Issuers = nil
		for _, template := range a.issuers(profile) {
			issuer := certmagic.NewACMEIssuer(config, template)
			issuer.Logger = logger
			config.Issuers = append(config.Issuers, issuer)
			state.issuers = append(state.issuers, issuer)
		}
		for _, subject := range subjects {
			byName[subject] = config
		}
	}
	state.config = byName[a.config.Names[0]]
	a.state.Store(state)

	for _, name := range a.config.Names {
		if err := byName[name].ManageAsync(ctx, []string{name}); err != nil {
			return err
		}
	}
	<-ctx.Done()
	return nil
}

// issuers are tried in their order. There are two because certmagic's issuer
// proves either by DNS or by the listeners, never by both.
func (a *ACME) issuers(profile string) []certmagic.ACMEIssuer {
	c := a.config
	issuer := certmagic.ACMEIssuer{
		CA:                      c.Directory,
		TrustedRoots:            c.Roots,
		Email:                   c.Email,
		Agreed:                  true,
		Profile:                 profile,
		ListenHost:              c.ListenHost,
		AltHTTPPort:             c.HTTPPort,
		AltTLSALPNPort:          c.TLSPort,
		DisableHTTPChallenge:    c.HTTPPort == 0,
		DisableTLSALPNChallenge: c.TLSPort == 0,
		// There is one relay to a data directory.
		DisableDistributedSolvers: true,
		Logger:                    zapLogger(c.Log),
	}
	if c.EABKeyID != "" {
		issuer.ExternalAccount = &acme.EAB{KeyID: c.EABKeyID, MACKey: c.EABKey}
	}
	if c.DNS == nil || profile == shortlived {
		return []certmagic.ACMEIssuer{issuer}
	}
	byDNS := issuer
	byDNS.DNS01Solver = c.DNS.solver(issuer.Logger)
	if c.HTTPPort == 0 && c.TLSPort == 0 {
		return []certmagic.ACMEIssuer{byDNS}
	}
	return []certmagic.ACMEIssuer{byDNS, issuer}
}

// onEvent follows what certmagic does; it must be quick.
func (a *ACME) onEvent(_ context.Context, event string, data map[string]any) error {
	switch event {
	case "cert_failed":
		if err, ok := data["error"].(error); ok {
			a.failed(explain(fmt.Sprint(data["identifier"]), err))
		}
	case "cert_obtained":
		a.err.Store(nil)
		a.config.Log.Info().Any("name", data["identifier"]).Any("renewal", data["renewal"]).Msg("certificate obtained")
	case "cached_managed_cert":
		names, _ := data["sans"].([]string)
		for _, name := range names {
			if name == a.config.Names[0] {
				a.once.Do(func() { close(a.ready) })
			}
		}
	}
	return nil
}

// stopCache stops certmagic's maintenance, which may be waiting for an authority
// that does not answer: the relay's stop must not wait with it. What it leaves
// behind is a lock file, which certmagic takes over once it is stale.
func stopCache(cache *certmagic.Cache) {
	stopped := make(chan struct{})
	go func() {
		cache.Stop()
		close(stopped)
	}()
	timeout := time.NewTimer(stopWithin)
	defer timeout.Stop()
	select {
	case <-stopped:
	case <-timeout.C:
	}
}

// failed keeps the error for health, and logs it unless it is the one that was
// logged last: the authority is asked again and again.
func (a *ACME) failed(err error) {
	if last := a.err.Swap(&errorValue{err}); last != nil && last.Error() == err.Error() {
		return
	}
	a.config.Log.Warn().Err(err).Msg("certificate not obtained")
}

// GetCertificate implements [Manager].
func (a *ACME) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	state := a.state.Load()
	if state == nil {
		return nil, ErrNone
	}
	return state.config.GetCertificate(hello)
}

// HTTPHandler implements [Manager].
func (a *ACME) HTTPHandler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if state := a.state.Load(); state != nil {
			for _, issuer := range state.issuers {
				if issuer.HandleHTTPChallenge(w, r) {
					return
				}
			}
		}
		next.ServeHTTP(w, r)
	})
}

// Ready implements [Manager].
func (a *ACME) Ready() <-chan struct{} { return a.ready }

// Status implements [Manager].
func (a *ACME) Status() Status {
	s := Status{Err: ErrNone}
	if state := a.state.Load(); state != nil {
		if found := state.cache.AllMatchingCertificates(a.config.Names[0]); len(found) > 0 {
			s.Leaf, s.Err = found[0].Leaf, nil
		}
	}
	if e := a.err.Load(); e != nil {
		s.Err = e.error
	}
	return s
}

// split parts DNS names from IP addresses.
func split(subjects []string) (names, addresses []string) {
	for _, s := range subjects {
		if net.ParseIP(s) != nil {
			addresses = append(addresses, s)
		} else {
			names = append(names, s)
		}
	}
	return names, addresses
}
