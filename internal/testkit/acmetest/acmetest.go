// Package acmetest runs a certificate authority in the test process: pebble, the
// ACME test server of Let's Encrypt, and its DNS server. [New] and [DNS] are for
// programs; tests call [Start].
package acmetest

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/letsencrypt/challtestsrv"
	"github.com/letsencrypt/pebble/v2/ca"
	"github.com/letsencrypt/pebble/v2/db"
	"github.com/letsencrypt/pebble/v2/va"
	"github.com/letsencrypt/pebble/v2/wfe"

	"derpd/internal/testkit"
)

// CA is a running authority.
type CA struct {
	// Directory is the URL of the ACME directory.
	Directory string

	// ServerRoots and RootsFile hold the root of the authority's own HTTPS
	// server.
	ServerRoots *x509.CertPool
	RootsFile   string

	// ExternalAccounts are key IDs and their MAC keys in base64url. Every account
	// must be bound to one of them (RFC 8555 §7.3.4), unless the map is empty.
	// Set it before Validate.
	ExternalAccounts map[string]string

	// Validity is the validity of issued certificates; 0 for pebble's default.
	// Set it before Validate.
	Validity time.Duration

	// RejectNonces is the percentage of good nonces that the authority refuses.
	// Set it before Validate.
	RejectNonces int

	// Refuse answers orders in place of the authority while it is set.
	Refuse atomic.Pointer[http.HandlerFunc]

	// Orders counts the requests for new orders.
	Orders atomic.Int64

	front   *httptest.Server
	dns     string
	handler http.Handler
	issued  *ca.CAImpl
	once    sync.Once
	serving chan struct{} // closed when handler is set

	// Asked is closed at the first request.
	Asked   chan struct{}
	askOnce sync.Once
}

// Start starts an authority that answers only after Validate. The authority
// resolves every DNS name to 127.0.0.1.
func Start(t testing.TB) *CA {
	t.Helper()
	return StartResolving(t, startDNS(t))
}

// StartResolving is Start with a DNS server of the caller (host:port, UDP and
// TCP), for tests of DNS-01.
func StartResolving(t testing.TB, server string) *CA {
	t.Helper()
	t.Setenv("PEBBLE_VA_NOSLEEP", "1")
	c, err := New(t.TempDir(), server)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Stop)
	return c
}

// New starts an authority that answers only after Serve, and resolves names with a
// DNS server (host:port, UDP and TCP). RootsFile is in dir. Stop ends the authority.
func New(dir, server string) (*CA, error) {
	c := &CA{dns: server, serving: make(chan struct{}), Asked: make(chan struct{})}
	front := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.askOnce.Do(func() { close(c.Asked) })
		if r.URL.Path == "/order-plz" {
			c.Orders.Add(1)
			if refuse := c.Refuse.Load(); refuse != nil {
				(*refuse)(w, r)
				return
			}
		}
		select {
		case <-c.serving:
			c.handler.ServeHTTP(w, r)
		case <-r.Context().Done():
		}
	}))
	c.front = front
	c.Directory = front.URL + wfe.DirectoryPath
	c.ServerRoots = x509.NewCertPool()
	c.ServerRoots.AddCert(front.Certificate())
	c.RootsFile = filepath.Join(dir, "ca.pem")
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: front.Certificate().Raw})
	if err := os.WriteFile(c.RootsFile, root, 0o600); err != nil {
		front.Close()
		return nil, err
	}
	return c, nil
}

// Stop makes the authority refuse connections, until Resume.
func (c *CA) Stop() { c.front.Close() }

// Resume listens on the same address again after Stop.
func (c *CA) Resume(t testing.TB) {
	t.Helper()
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", c.front.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	front := httptest.NewUnstartedServer(c.front.Config.Handler)
	_ = front.Listener.Close()
	front.Listener = ln
	front.StartTLS()
	c.front = front
}

// Validate is Serve for tests.
func (c *CA) Validate(t testing.TB, httpPort, tlsPort int) {
	t.Helper()
	t.Setenv("PEBBLE_WFE_NONCEREJECT", strconv.Itoa(c.RejectNonces))
	if err := c.Serve(httpPort, tlsPort); err != nil {
		t.Error(err)
	}
}

// Serve sets the ports where the authority validates challenges, and starts to
// answer requests. Earlier requests wait, because the ports are known only when the
// caller's listeners are bound. Only the first call has an effect.
func (c *CA) Serve(httpPort, tlsPort int) (err error) {
	c.once.Do(func() {
		validity := uint64(c.Validity.Seconds()) // 0 is the authority's default
		// A logger for io.Discard itself skips its lock. Pebble needs that lock,
		// which orders its handlers and its finalizing.
		quiet := log.New(struct{ io.Writer }{io.Discard}, "", 0)
		store := db.NewMemoryStore()
		c.issued = ca.New(quiet, store, "", "ecdsa", 0, 1, map[string]ca.Profile{
			"default":    {Description: "default", ValidityPeriod: validity},
			"shortlived": {Description: "six days", ValidityPeriod: cmp.Or(validity, 6*24*3600)},
		})
		validation := va.New(quiet, httpPort, tlsPort, false, c.dns, store)
		for id, key := range c.ExternalAccounts {
			err = errors.Join(err, store.AddExternalAccountKeyByID(id, key))
		}
		front := wfe.New(quiet, store, validation, c.issued, nil, false, len(c.ExternalAccounts) > 0, 1, 1)
		c.handler = front.Handler()
		close(c.serving)
	})
	return err
}

// Root is the root of issued certificates. Call Validate first.
func (c *CA) Root() *x509.Certificate { return c.issued.GetRootCert(0).Cert }

// Roots returns a pool with Root.
func (c *CA) Roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(c.Root())
	return pool
}

// startDNS is DNS for tests.
func startDNS(t testing.TB) string {
	t.Helper()
	addr := testkit.FreeAddr(t)
	stop, err := DNS(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return addr
}

// DNS starts a server that answers 127.0.0.1 for every name, on host:port.
func DNS(addr string) (stop func(), err error) {
	var out bytes.Buffer
	server, err := challtestsrv.New(challtestsrv.Config{
		DNSAddrs: []string{addr},
		Log:      log.New(&out, "", 0),
	})
	if err != nil {
		return nil, err
	}
	server.SetDefaultDNSIPv4("127.0.0.1")
	server.SetDefaultDNSIPv6("")
	go server.Run()
	return server.Shutdown, nil
}
