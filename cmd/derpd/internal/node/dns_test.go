package node

import (
	"crypto/tls"
	"os"
	"path/filepath"
	"testing"

	"github.com/miekg/dns"
	"tailscale.com/derp/derphttp"

	"derpd/internal/testkit"
	"derpd/internal/testkit/acmetest"
)

// A relay that can be reached on neither 80 nor 443 gets its certificate by
// records in a real DNS server, and leaves none there.
func TestDNSChallenge(t *testing.T) {
	server := acmetest.StartNamed(t)
	authority := acmetest.StartResolving(t, server.Addr)
	authority.Validate(t, 1, 1)
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte(acmetest.Key+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	n := begin(t, testkit.Environ(t, "DERP_DOMAIN=derp.example.com", "DERP_HTTP_PORT=-1",
		"DERP_ACME_CA="+authority.Directory, "DERP_ACME_CA_ROOTS="+authority.RootsFile,
		"DERP_DNS_PROVIDER=rfc2136", "DERP_DNS_RESOLVERS="+server.Addr, "DERP_DNS_RFC2136_SERVER="+server.Addr,
		"DERP_DNS_RFC2136_KEY_NAME="+acmetest.KeyName, "DERP_DNS_RFC2136_KEY_FILE="+key))
	r := region(t, parsePolicy(t, n.printed))
	roots := authority.Roots()
	exchangeOver(t, r, func(c *derphttp.Client) { c.TLSConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12} })
	if left := server.Lookup(t, "_acme-challenge.derp.example.com", dns.TypeTXT); left != "" {
		t.Errorf("the challenge was left in the zone: %s", left)
	}
}
