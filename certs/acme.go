package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
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

const (
	// checkEvery is the default of CheckEvery.
	checkEvery = time.Minute

	// firstPause and longestPause are between two attempts to reach an
	// authority, or to store something, before anything was asked for.
	firstPause   = time.Second
	longestPause = time.Minute

	// refusedPause comes after a refusal that certmagic takes as final.
	refusedPause = time.Hour

	// reachTimeout bounds one question to the authority.
	reachTimeout = 30 * time.Second
)

// stopWithin bounds the wait for certmagic at the stop.
const stopWithin = 300 * time.Millisecond

// ACMEConfig says what to obtain, from whom, and how to prove it (RFC 8555).
type ACMEConfig struct {
	// Names are DNS names and IP addresses, each with a certificate of its
	// own. The manager is ready when the first has one.
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

	// Lookup finds what DNS says of a name that could not be proven; nil for
	// the system's resolver.
	Lookup LookupFunc

	// CheckEvery is how often to look whether a certificate is due; 0 for a
	// minute. A renewal that failed is tried again after growing pauses.
	CheckEvery time.Duration

	Dir string // where accounts, keys and certificates are kept
	Log zerolog.Logger
}

// Stored reports whether a certificate that is valid now is in Dir for every
// name: if so, there is nothing to write until one is due.
func (c ACMEConfig) Stored() bool {
	stored := newStorage(c.Dir, nil)
	authority := (&certmagic.ACMEIssuer{CA: c.Directory}).IssuerKey()
	for _, name := range c.Names {
		data, err := stored.Load(context.Background(), certmagic.StorageKeys.SiteCert(authority, name))
		if err != nil {
			return false
		}
		pair, err := tls.X509KeyPair(data, data)
		if err != nil || time.Now().After(pair.Leaf.NotAfter) {
			return false
		}
	}
	return true
}

// ACME obtains and renews certificates with certmagic.
type ACME struct {
	config ACMEConfig
	ready  chan struct{}
	once   sync.Once                 // closes ready
	state  atomic.Pointer[acmeState] // nil until Run

	renewed, failures atomic.Uint64

	mu     sync.Mutex
	faults map[string]*explained // by name, and by "" for the storage; guarded by mu
}

// acmeState is what certmagic keeps while it runs. Its configurations share
// one cache, so each of them serves all certificates.
type acmeState struct {
	cache   *certmagic.Cache
	config  *certmagic.Config // of the first name
	issuers []*certmagic.ACMEIssuer
}

// NewACME returns a manager that obtains nothing until Run.
func NewACME(c ACMEConfig) *ACME {
	if c.CheckEvery == 0 {
		c.CheckEvery = checkEvery
	}
	if c.Lookup == nil {
		c.Lookup = net.DefaultResolver.LookupNetIP
	}
	return &ACME{config: c, ready: make(chan struct{}), faults: make(map[string]*explained)}
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
		RenewCheckInterval: a.config.CheckEvery,
		Logger:             logger,
	})
	var managing sync.WaitGroup
	defer stop(cache, &managing)

	state := &acmeState{cache: cache}
	files := newStorage(a.config.Dir, a.wrote)
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
			if !a.manage(ctx, byName[name], name) {
				return
			}
			// What was stored may have become due while the relay was down.
			if err := cache.RenewManagedCertificates(ctx); err != nil {
				a.config.Log.Debug().Err(err).Msg("looking for certificates that are due")
			}
		})
	}
	<-ctx.Done()
	return nil
}

// manage serves what is stored, or obtains it. What certmagic's own retries do
// not cover is tried again here: an authority that cannot be reached at all,
// since a machine that has just started may have no network yet, and a
// directory that cannot be written to. It reports whether there is a certificate
// at last.
func (a *ACME) manage(ctx context.Context, config *certmagic.Config, name string) bool {
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		err := a.loadOrObtain(ctx, config, name)
		if ctx.Err() != nil {
			return false
		}
		if err == nil {
			a.mended(name)
			return true
		}
		wait := pause
		a.mu.Lock()
		told := a.faults[""] != nil
		a.mu.Unlock()
		if _, refused := errors.AsType[certmagic.ErrNoRetry](err); refused {
			wait, told = refusedPause, true
		}
		if !told {
			a.failed(name, explain(name, err))
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

func (a *ACME) loadOrObtain(ctx context.Context, config *certmagic.Config, name string) error {
	_, err := config.CacheManagedCertificate(ctx, name)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, ok := errors.AsType[damagedError](err); ok {
		a.config.Log.Warn().Err(err).Str("name", name).Msg("stored certificate is damaged, another one is obtained")
	}
	if err := a.reach(ctx); err != nil {
		return err
	}
	if err := config.ObtainCertAsync(ctx, name); err != nil {
		return err
	}
	_, err = config.CacheManagedCertificate(ctx, name)
	return err
}

// reach asks the authority for its directory. Asking costs it nothing, so the
// pauses are short; certmagic's begin with a minute.
func (a *ACME) reach(ctx context.Context) error {
	client := &http.Client{
		Timeout: reachTimeout,
		Transport: &http.Transport{
			Proxy:             http.ProxyFromEnvironment,
			TLSClientConfig:   &tls.Config{RootCAs: a.config.Roots, MinVersion: tls.VersionTLS12},
			DisableKeepAlives: true,
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.config.Directory, http.NoBody)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	return res.Body.Close()
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

// onEvent follows what certmagic does.
func (a *ACME) onEvent(ctx context.Context, event string, data map[string]any) error {
	switch event {
	case "cert_failed":
		name := fmt.Sprint(data["identifier"])
		if err, ok := data["error"].(error); ok && !errors.Is(err, context.Canceled) {
			fault := explain(name, err)
			fault.words += whereTo(ctx, name, err, a.config.Lookup)
			a.failed(name, fault)
		}
	case "cert_obtained":
		a.mended(fmt.Sprint(data["identifier"]))
		if renewal, _ := data["renewal"].(bool); renewal {
			a.renewed.Add(1)
		}
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

// stop stops certmagic's maintenance and waits for what is under way. Either may
// be waiting for an authority that does not answer: the relay's stop must not
// wait with it.
func stop(cache *certmagic.Cache, managing *sync.WaitGroup) {
	stopped := make(chan struct{})
	go func() {
		cache.Stop()
		managing.Wait()
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
func (a *ACME) failed(name string, fault *explained) {
	a.failures.Add(1)
	a.mu.Lock()
	last := a.faults[name]
	a.faults[name] = fault
	a.mu.Unlock()
	if last == nil || last.kind != fault.kind {
		a.config.Log.Warn().Err(fault).Msg("certificate not obtained")
	}
}

// mended takes the error back.
func (a *ACME) mended(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.faults, name)
}

// wrote follows the storage: certmagic only logs what it cannot write.
func (a *ACME) wrote(err error) {
	if err == nil {
		a.mended("")
		return
	}
	a.failed("", notStored(a.config.Dir, err))
}

// fault is what to mend first, or nil.
func (a *ACME) fault() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, name := range append([]string{""}, a.config.Names...) {
		if fault := a.faults[name]; fault != nil {
			return fault
		}
	}
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

// Ready implements [Manager].
func (a *ACME) Ready() <-chan struct{} { return a.ready }

// Status implements [Manager].
func (a *ACME) Status() Status {
	s := Status{Err: ErrNone, Reloads: a.renewed.Load(), ReloadErrors: a.failures.Load()}
	if state := a.state.Load(); state != nil {
		if found := state.cache.AllMatchingCertificates(a.config.Names[0]); len(found) > 0 {
			s.Leaf, s.Err = found[0].Leaf, nil
		}
	}
	if err := a.fault(); err != nil {
		s.Err = err
	}
	return s
}
