// Package acmetest runs a real certificate authority in the test process:
// pebble, which the makers of Let's Encrypt keep for this purpose, and its DNS
// server.
package acmetest

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/pem"
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
)

// CA is a running authority.
type CA struct {
	// Directory is the URL of the ACME directory.
	Directory string

	// ServerRoots is the pool, and RootsFile a file, of the root of the
	// authority's own HTTPS server.
	ServerRoots *x509.CertPool
	RootsFile   string

	// ExternalAccounts are key IDs and their MAC keys, base64url, without
	// which no account is opened (RFC 8555 §7.3.4). Set it before Validate;
	// none means that anybody may.
	ExternalAccounts map[string]string

	// Validity is that of what is issued; 0 for what is usual. Set it before
	// Validate, as well as RejectNonces, the percentage of good nonces that
	// are refused.
	Validity     time.Duration
	RejectNonces int

	// Refuse, when it holds a function, answers orders in place of the
	// authority.
	Refuse atomic.Pointer[http.HandlerFunc]

	front   *httptest.Server
	dns     string
	handler http.Handler
	issued  *ca.CAImpl
	once    sync.Once
	serving chan struct{} // closed when handler is set

	// Asked is closed when the first request comes in.
	Asked   chan struct{}
	askOnce sync.Once
}

// Start starts an authority, which answers only after Validate. Every DNS name
// resolves to 127.0.0.1 for it.
func Start(t *testing.T) *CA {
	t.Helper()
	return StartResolving(t, startDNS(t))
}

// StartResolving is Start with a DNS server (host:port, UDP and TCP) of the
// caller's, so that DNS-01 can be tried.
func StartResolving(t *testing.T, server string) *CA {
	t.Helper()
	t.Setenv("PEBBLE_VA_NOSLEEP", "1")

	c := &CA{dns: server, serving: make(chan struct{}), Asked: make(chan struct{})}
	front := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.askOnce.Do(func() { close(c.Asked) })
		if refuse := c.Refuse.Load(); refuse != nil && r.URL.Path == "/order-plz" {
			(*refuse)(w, r)
			return
		}
		select {
		case <-c.serving:
			c.handler.ServeHTTP(w, r)
		case <-r.Context().Done():
		}
	}))
	c.front = front
	t.Cleanup(func() { c.front.Close() })
	c.Directory = front.URL + wfe.DirectoryPath
	c.ServerRoots = x509.NewCertPool()
	c.ServerRoots.AddCert(front.Certificate())
	c.RootsFile = filepath.Join(t.TempDir(), "ca.pem")
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: front.Certificate().Raw})
	if err := os.WriteFile(c.RootsFile, root, 0o600); err != nil {
		t.Fatal(err)
	}
	return c
}

// Stop makes the authority refuse connections, until Resume.
func (c *CA) Stop() { c.front.Close() }

// Resume listens where it listened before.
func (c *CA) Resume(t *testing.T) {
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

// Validate lets requests through, and says on which ports the authority finds
// the challenges. The caller learns them only once its listeners are bound,
// and its first request may come before that.
func (c *CA) Validate(t *testing.T, httpPort, tlsPort int) {
	t.Helper()
	c.once.Do(func() {
		t.Setenv("PEBBLE_WFE_NONCEREJECT", strconv.Itoa(c.RejectNonces))
		validity := uint64(c.Validity.Seconds()) // 0 is the authority's default
		// log does nothing at all for io.Discard itself. Pebble's handlers
		// and its finalizing are ordered only by the log's lock.
		quiet := log.New(struct{ io.Writer }{io.Discard}, "", 0)
		store := db.NewMemoryStore()
		c.issued = ca.New(quiet, store, "", "ecdsa", 0, 1, map[string]ca.Profile{
			"default":    {Description: "default", ValidityPeriod: validity},
			"shortlived": {Description: "six days", ValidityPeriod: cmp.Or(validity, 6*24*3600)},
		})
		validation := va.New(quiet, httpPort, tlsPort, false, c.dns, store)
		for id, key := range c.ExternalAccounts {
			if err := store.AddExternalAccountKeyByID(id, key); err != nil {
				t.Error(err)
			}
		}
		front := wfe.New(quiet, store, validation, c.issued, nil, false, len(c.ExternalAccounts) > 0, 1, 1)
		c.handler = front.Handler()
		close(c.serving)
	})
}

// Root signs what the authority issues. Validate must have been called.
func (c *CA) Root() *x509.Certificate { return c.issued.GetRootCert(0).Cert }

// Roots is the pool of Root.
func (c *CA) Roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(c.Root())
	return pool
}

// startDNS answers 127.0.0.1 for every name.
func startDNS(t *testing.T) string {
	t.Helper()
	addr := net.JoinHostPort("127.0.0.1", FreePort(t))
	var out bytes.Buffer
	server, err := challtestsrv.New(challtestsrv.Config{
		DNSAddrs: []string{addr},
		Log:      log.New(&out, "", 0),
	})
	if err != nil {
		t.Fatal(err)
	}
	server.SetDefaultDNSIPv4("127.0.0.1")
	server.SetDefaultDNSIPv6("")
	go server.Run()
	t.Cleanup(server.Shutdown)
	return addr
}
