package certs_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"derpd/certs"
	"derpd/internal/testkit"
	"derpd/internal/testkit/acmetest"
)

// listenOn is listen with two listeners on given addresses.
func listenOn(t *testing.T, https, plain string) listeners {
	t.Helper()
	var l listeners
	for ln, addr := range map[*net.Listener]string{&l.https: https, &l.http: plain} {
		var err error
		if *ln, err = new(net.ListenConfig).Listen(t.Context(), "tcp", addr); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = (*ln).Close() })
	}
	return l
}

// eventually dials until the client accepts the certificate. The manager is ready
// when the first name has one.
func eventually(t *testing.T, l listeners, host string, config *tls.Config) *x509.Certificate {
	t.Helper()
	addr := net.JoinHostPort(host, strconv.Itoa(portOf(l.https)))
	var leaf *x509.Certificate
	testkit.Wait(t, "a certificate for "+config.ServerName+" at "+host, func(ctx context.Context) error {
		conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", addr)
		if err != nil {
			return err
		}
		leaf = conn.(*tls.Conn).ConnectionState().PeerCertificates[0]
		return conn.Close()
	})
	return leaf
}

// Each name has a separate certificate. A client gets the certificate for its SNI, or
// for the dialled address without SNI.
func TestACMESeveralNames(t *testing.T) {
	for _, tt := range []struct {
		name   string
		names  []string
		listen string
		// what clients dial: an address, and the name that they verify.
		// crypto/tls sends SNI for DNS names alone (RFC 6066 §3).
		clients [][2]string
	}{
		{
			"names and an address",
			[]string{"derp.example.com", "relay.example.net", "127.0.0.1"},
			"127.0.0.1:0",
			[][2]string{{"127.0.0.1", "derp.example.com"}, {"127.0.0.1", "relay.example.net"}, {"127.0.0.1", "127.0.0.1"}},
		},
		{"an IPv6 address", []string{"::1"}, "[::1]:0", [][2]string{{"::1", "::1"}}},
		{
			"an address of each family",
			[]string{"127.0.0.1", "::1"},
			"[::]:0",
			[][2]string{{"127.0.0.1", "127.0.0.1"}, {"::1", "::1"}},
		},
		{
			// 127.0.0.2 is the inside of a port mapping. The client dialled
			// 127.0.0.1.
			"behind a port mapping",
			[]string{"derp.example.com", "::1", "127.0.0.1"},
			"[::]:0",
			[][2]string{{"127.0.0.2", "127.0.0.1"}, {"127.0.0.2", "derp.example.com"}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			authority := acmetest.Start(t)
			l := listenOn(t, tt.listen, tt.listen)
			authority.Validate(t, portOf(l.http), portOf(l.https))
			host, _, _ := net.SplitHostPort(tt.listen)
			m := certs.NewACME(certs.ACMEConfig{
				Names: tt.names, Directory: authority.Directory, Roots: authority.ServerRoots,
				ListenHost: host, HTTPPort: portOf(l.http), TLSPort: portOf(l.https), Dir: t.TempDir(), Log: zerolog.Nop(),
			})
			serveChallenges(t, m, l)
			waitReady(t, m)
			for _, client := range tt.clients {
				leaf := eventually(t, l, client[0], &tls.Config{ServerName: client[1], RootCAs: authority.Roots(), MinVersion: tls.VersionTLS12})
				covers := append([]string(nil), leaf.DNSNames...)
				for _, ip := range leaf.IPAddresses {
					covers = append(covers, ip.String())
				}
				if !slices.Equal(covers, []string{client[1]}) {
					t.Errorf("%s gets a certificate for %v, want one of its own", client[1], covers)
				}
				days := leaf.NotAfter.Sub(leaf.NotBefore).Round(time.Hour).Hours() / 24
				if net.ParseIP(client[1]) != nil && days != 6 {
					t.Errorf("%s: valid for %v days, want the six of the profile shortlived", client[1], days)
				}
			}
		})
	}
}

// forward forwards connections, as a port mapping does, and returns its port.
func forward(t *testing.T, to net.Listener) int {
	t.Helper()
	outside, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = outside.Close() })
	go func() {
		for {
			client, err := outside.Accept()
			if err != nil {
				return
			}
			inside, err := new(net.Dialer).DialContext(context.Background(), "tcp", to.Addr().String())
			if err != nil {
				_ = client.Close()
				continue
			}
			for _, way := range [][2]net.Conn{{client, inside}, {inside, client}} {
				go func() {
					_, _ = io.Copy(way[0], way[1])
					_ = way[0].Close()
				}()
			}
		}
	}()
	return portOf(outside)
}

// The listeners may use any ports, if a port mapping leads to them.
func TestACMEBehindAPortMapping(t *testing.T) {
	for _, challenge := range []string{"HTTP-01", "TLS-ALPN-01"} {
		t.Run(challenge, func(t *testing.T) {
			authority := acmetest.Start(t)
			l := listen(t)
			authority.Validate(t, forward(t, l.http), forward(t, l.https))
			c := certs.ACMEConfig{
				Names: []string{"derp.example.com", "127.0.0.1"}, Directory: authority.Directory, Roots: authority.ServerRoots,
				ListenHost: "127.0.0.1", Dir: t.TempDir(), Log: zerolog.Nop(),
			}
			if challenge == "HTTP-01" {
				c.HTTPPort = portOf(l.http)
			} else {
				c.TLSPort = portOf(l.https)
			}
			m := certs.NewACME(c)
			serveChallenges(t, m, l)
			waitReady(t, m)
			for _, name := range c.Names {
				eventually(t, l, "127.0.0.1", &tls.Config{ServerName: name, RootCAs: authority.Roots(), MinVersion: tls.VersionTLS12})
			}
		})
	}
}
