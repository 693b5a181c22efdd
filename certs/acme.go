package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/rs/zerolog"
)

// checkEvery is the default of [ACMEConfig.CheckEvery].
const checkEvery = time.Minute

// ACMEConfig describes the certificates to obtain, the authority, and the
// challenges that prove the names (RFC 8555).
type ACMEConfig struct {
	// Names are DNS names and IP addresses. Each gets a separate certificate.
	// The manager is ready when the first name has a certificate.
	Names []string

	Directory string         // URL of the authority's directory
	Roots     *x509.CertPool // roots of the authority's HTTPS server; nil for the system's
	Email     string         // contact of the account; may be empty

	// EABKeyID and EABKey bind the account to an existing account of the
	// authority (external account binding, RFC 8555 §7.3.4).
	EABKeyID, EABKey string

	// ListenHost, HTTPPort and TLSPort are the relay's own listeners, which
	// answer the challenges HTTP-01 and TLS-ALPN-01. Port 0 disables the
	// challenge.
	ListenHost        string
	HTTPPort, TLSPort int

	// DNS proves names by DNS-01; nil disables DNS-01. With DNS-01, the other
	// challenges are used only after DNS-01 has failed, and for IP addresses,
	// which DNS-01 cannot prove (RFC 8738 §7).
	DNS *DNSConfig

	// Lookup resolves a name after a failed challenge, for the error message;
	// nil for the system's resolver.
	Lookup LookupFunc

	// CheckEvery is the interval of the check for due renewals; 0 for a
	// minute. certmagic retries a failed renewal after growing pauses.
	CheckEvery time.Duration

	Dir string // directory of accounts, keys and certificates
	Log zerolog.Logger
}

// ACME obtains and renews certificates with certmagic.
type ACME struct {
	config ACMEConfig
	ready  chan struct{}
	once   sync.Once                 // closes ready
	state  atomic.Pointer[acmeState] // nil until Run

	renewed atomic.Uint64 // certificates that replaced another
	faults  *faults
}

// acmeState is the state of certmagic while Run runs. All configurations share one
// cache, so each configuration serves every certificate.
type acmeState struct {
	cache   *certmagic.Cache
	config  *certmagic.Config // of the first name
	issuers []*certmagic.ACMEIssuer
}

// NewACME returns a manager that obtains nothing before Run.
func NewACME(c ACMEConfig) *ACME {
	if c.CheckEvery == 0 {
		c.CheckEvery = checkEvery
	}
	if c.Lookup == nil {
		c.Lookup = net.DefaultResolver.LookupNetIP
	}
	return &ACME{config: c, ready: make(chan struct{}), faults: newFaults(c.Log)}
}

// Run implements [Manager]. A failure of the authority never ends Run: certmagic
// retries for weeks, after pauses that grow to hours.
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
		RenewCheckInterval: a.config.CheckEvery,
		Logger:             logger,
	})
	var managing sync.WaitGroup
	defer waitToStop(func() {
		cache.Stop()
		managing.Wait()
	})

	state := &acmeState{cache: cache}
	files := newStorage(a.config.Dir, a.onWrite)
	byName = make(map[string]*certmagic.Config)
	for profile, subjects := range map[string][]string{"": names, shortlived: addresses} {
		if len(subjects) == 0 {
			continue
		}
		config := certmagic.New(cache, certmagic.Config{
			Storage:   files,
			KeySource: certmagic.StandardKeyGenerator{KeyType: certmagic.P256},
			OnEvent:   a.onEvent,
			Logger:    logger,
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
		managing.Go(func() {
			if !a.obtain(ctx, byName[name], name) {
				return
			}
			// A stored certificate may have become due while the relay was stopped.
			if err := cache.RenewManagedCertificates(ctx); err != nil {
				a.config.Log.Debug().Err(err).Msg("renewal check failed")
			}
		})
	}
	<-ctx.Done()
	return nil
}

// GetCertificate implements [Manager].
func (a *ACME) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	state := a.state.Load()
	if state == nil {
		return nil, ErrNone
	}
	if hello.ServerName != "" {
		return state.config.GetCertificate(hello)
	}
	for _, name := range withoutSNI(a.config.Names, hello.Conn) {
		if found := state.cache.AllMatchingCertificates(name); len(found) > 0 {
			return &found[0].Certificate, nil
		}
	}
	return nil, ErrNone
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

// Accept implements [Manager]. Renewals by an authority never change the map.
func (a *ACME) Accept(string) error { return ErrNothingWaits }

// Ready implements [Manager].
func (a *ACME) Ready() <-chan struct{} { return a.ready }

// Status implements [Manager].
func (a *ACME) Status() Status {
	s := Status{Err: ErrNone, Reloads: a.renewed.Load(), ReloadErrors: a.faults.count()}
	if state := a.state.Load(); state != nil {
		if found := state.cache.AllMatchingCertificates(a.config.Names[0]); len(found) > 0 {
			s.Leaf, s.Chain, s.Err = found[0].Leaf, found[0].Certificate.Certificate, nil
		}
	}
	if err := a.faults.first(a.config.Names); err != nil {
		s.Err = err
	}
	return s
}
