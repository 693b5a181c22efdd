package node

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tailscale.com/derp/derphttp"
	"tailscale.com/types/key"

	"derpd/certs"
	"derpd/cmd/derpd/internal/config"
	"derpd/healthz"
	"derpd/internal/testkit"
	"derpd/internal/testkit/acmetest"
)

// shown returns the certificate that a client receives and verifies.
func shown(t *testing.T, n *testNode, name string, roots *x509.CertPool) *x509.Certificate {
	t.Helper()
	dialer := &tls.Dialer{Config: &tls.Config{ServerName: name, RootCAs: roots, MinVersion: tls.VersionTLS12}}
	conn, err := dialer.DialContext(t.Context(), "tcp", n.listeners.https.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0]
}

// freshName makes a name that certmagic has not seen in this process. For a
// known name certmagic may pause, after a renewal that failed in an earlier
// test.
func freshName(prefix string) string {
	return fmt.Sprintf("%s-%d.example.com", prefix, time.Now().UnixNano())
}

// TestRenewalWithClientsConnected renews the certificate while clients are
// connected. New connections get the new certificate, and the old connections
// stay.
func TestRenewalWithClientsConnected(t *testing.T) {
	const clients = 50
	authority := acmetest.Start(t)
	authority.Validity = 30 * time.Second
	domain := freshName("renewal")
	c, err := config.Load(testkit.Environ(t, "DERP_DOMAIN="+domain, "DERP_ACME_CA="+authority.Directory, "DERP_ACME_CA_ROOTS="+authority.RootsFile))
	if err != nil {
		t.Fatal(err)
	}
	c.Certificate.ACME.CheckEvery = 200 * time.Millisecond
	n := beginConfig(t, c, nil, func(n *Node) {
		authority.Validate(t, port(n.listeners.http.Addr()), port(n.listeners.https.Addr()))
	})
	roots := authority.Roots()
	r := region(t, parsePolicy(t, n.printed))

	list := make([]*derphttp.Client, clients)
	from := make([]netip.AddrPort, clients)
	for i := range list {
		list[i] = testkit.RegionClient(t, r, key.NewNode())
		list[i].TLSConfig = testkit.Trust(roots)
		testkit.MustAdmit(t, list[i])
		if from[i], err = list[i].LocalAddr(); err != nil {
			t.Fatal(err)
		}
	}
	before := shown(t, n, domain, roots)
	renewals := n.certs.Status().Reloads

	testkit.Until(t, "there is another certificate", func() bool {
		s := n.certs.Status()
		return s.Reloads > renewals && !s.Leaf.Equal(before)
	})
	if shown(t, n, domain, roots).Equal(before) {
		t.Error("a new connection gets the old certificate")
	}
	for pair := range slices.Chunk(list, 2) {
		testkit.Exchange(t, pair[0], pair[1])
	}
	for i, client := range list {
		// A lost connection shows by its local address, since derphttp
		// dials again.
		if now, err := client.LocalAddr(); err != nil || now != from[i] {
			t.Errorf("client %d was at %s, is at %s (%v)", i, from[i], now, err)
		}
	}
}

// TestEndIsAnnounced asserts when health begins to warn of the end of a
// certificate that derpd does not renew.
func TestEndIsAnnounced(t *testing.T) {
	for _, tt := range []struct {
		name   string
		env    []string
		file   string
		warn   int // days before the end at which health warns
		remedy string
	}{
		{"pinned", nil, "certs/pinned.pem", 30, "days left; make a new one with `derpd pin --rotate` and paste the new map"},
		{"manual", []string{"DERP_CERT_MODE=manual", "DERP_DOMAIN=derp.example.com"}, "", 30, "days left; renew the files"},
	} {
		for _, left := range []int{tt.warn + 2, tt.warn - 1} {
			env := append(testkit.Environ(t), tt.env...)
			dir := t.TempDir()
			env = append(env, "DERP_DATA_DIR="+dir)
			made := time.Now().AddDate(-10, 0, left) // its validity is ten years
			if tt.file == "" {
				pair("certs/derp.example.com", "derp.example.com", made)(t, dir)
			} else if err := certs.RotatePinned(certs.PinnedConfig{Path: filepath.Join(dir, tt.file), Names: []string{"127.0.0.1"}}, made); err != nil {
				t.Fatal(err)
			}
			n := begin(t, env)
			result := n.checkCertificate(t.Context())
			warned := result.Level == healthz.Warn && strings.HasSuffix(result.Detail, tt.remedy)
			if due := left < tt.warn; warned != due {
				t.Errorf("%s, %d days left: %+v, want a warning: %t", tt.name, left, result, due)
			}
			n.stop()
		}
	}
}
