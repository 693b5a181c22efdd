package main

import (
	"crypto/tls"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"tailscale.com/derp/derphttp"

	"derpd/certs"
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
	n := begin(t, loopbackEnv(t, "DERP_DOMAIN=derp.example.com", "DERP_HTTP_PORT=-1",
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

// providerFields is each provider as it is made from an environment in which
// every credential has its own name in lower case for a value, or the value in
// providerValues.
var providerFields = map[string]string{
	"acmedns":      `{"username":"username","password":"password","subdomain":"subdomain","server_url":"https://auth.example.net"}`,
	"alidns":       `{"access_key_id":"access_key_id","access_key_secret":"access_key_secret","security_token":"security_token"}`,
	"cloudflare":   `{"api_token":"api_token","zone_token":"zone_token"}`,
	"desec":        `{"token":"token"}`,
	"digitalocean": `{"auth_token":"api_token"}`,
	"duckdns":      `{"api_token":"api_token"}`,
	"gandi":        `{"bearer_token":"api_token"}`,
	"godaddy":      `{"api_token":"api_key:api_secret"}`,
	"hetzner":      `{"api_token":"api_token"}`,
	"namecheap":    `{"api_key":"api_key","user":"api_user","client_ip":"192.0.2.1"}`,
	"ovh":          `{"endpoint":"ovh-ca","application_key":"application_key","application_secret":"application_secret","consumer_key":"consumer_key"}`,
	"porkbun":      `{"api_key":"api_key","api_secret_key":"api_secret_key"}`,
	"rfc2136":      `{"key_name":"key_name","key_alg":"hmac-sha512","key":"a2V5","server":"192.0.2.1:53"}`,
	"route53":      `{"region":"region","access_key_id":"access_key_id","secret_access_key":"secret_access_key","session_token":"session_token","hosted_zone_id":"hosted_zone_id"}`,
	"tencentcloud": `{"SecretId":"secret_id","SecretKey":"secret_key","SessionToken":"session_token","Region":""}`,
}

// providerValues are for the credentials that have a rule.
var providerValues = map[string]string{
	"DERP_DNS_ACMEDNS_SERVER_URL":  "https://auth.example.net/",
	"DERP_DNS_NAMECHEAP_CLIENT_IP": "192.0.2.1",
	"DERP_DNS_OVH_ENDPOINT":        "ovh-ca",
	"DERP_DNS_RFC2136_SERVER":      "192.0.2.1:53",
	"DERP_DNS_RFC2136_KEY_ALG":     "hmac-sha512",
	"DERP_DNS_RFC2136_KEY":         "a2V5",
}

// fieldsOf is the inside of the provider that a configuration holds.
func fieldsOf(t *testing.T, c *config) string {
	t.Helper()
	data, err := json.Marshal(c.acme.DNS.Provider)
	if err != nil {
		t.Fatal(err)
	}
	var guarded struct{ DNSProvider json.RawMessage }
	if err := json.Unmarshal(data, &guarded); err != nil {
		t.Fatal(err)
	}
	return string(guarded.DNSProvider)
}

func TestEveryProviderIsMadeFromItsEnvironment(t *testing.T) {
	for _, provider := range certs.DNSProviders {
		t.Run(provider.Name, func(t *testing.T) {
			env := []string{"DERP_DOMAIN=derp.example.com", "DERP_DATA_DIR=" + t.TempDir(), "DERP_DNS_PROVIDER=" + provider.Name}
			files := slices.Clone(env)
			dir := t.TempDir()
			for _, credential := range provider.Credentials {
				name := credentialName(provider.Name, credential.Field)
				value, ok := providerValues[name]
				if !ok {
					value = strings.ToLower(credential.Field)
				}
				env = append(env, name+"="+value)
				path := filepath.Join(dir, name)
				if err := os.WriteFile(path, []byte(value+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				files = append(files, name+"_FILE="+path)
			}
			for given, env := range map[string][]string{"values": env, "files": files} {
				c, err := loadConfig(env)
				if !provider.Included() {
					if want := "DERP_DNS_PROVIDER: " + provider.Name + " is not in this build, since it adds megabytes; build derpd with `-tags " + provider.Tag + "`"; err == nil || err.Error() != want {
						t.Errorf("%s: %v, want %s", given, err, want)
					}
					continue
				}
				if err != nil {
					t.Errorf("%s: %v", given, err)
				} else if got := fieldsOf(t, c); got != providerFields[provider.Name] {
					t.Errorf("%s:\n%s\nwant\n%s", given, got, providerFields[provider.Name])
				}
			}
		})
	}
}

func TestDNSConfiguration(t *testing.T) {
	base := []string{"DERP_DATA_DIR=" + t.TempDir(), "DERP_DNS_PROVIDER=rfc2136", "DERP_DNS_RFC2136_SERVER=ns.example.com:53", "DERP_DNS_RFC2136_KEY_NAME=derpd", "DERP_DNS_RFC2136_KEY=c2VjcmV0"}
	load := func(pairs ...string) *config {
		t.Helper()
		c, err := loadConfig(append(pairs, base...))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}

	c := load("DERP_DOMAIN=derp.example.com")
	if !c.acmeDNS || c.acmeHTTP || c.acmeTLS {
		t.Errorf("a provider leaves the other challenges out: DNS %t, HTTP %t, TLS %t", c.acmeDNS, c.acmeHTTP, c.acmeTLS)
	}
	if d := c.acme.DNS; d.PropagationTimeout != 2*time.Minute || d.Resolvers != nil || d.Delegate != "" {
		t.Errorf("defaults: %+v", d)
	}
	if got, want := fieldsOf(t, c), `{"key_name":"derpd","key_alg":"hmac-sha256","key":"c2VjcmV0","server":"ns.example.com:53"}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}

	c = load("DERP_DOMAIN=derp.example.com,203.0.113.7", "DERP_ACME_CHALLENGES=dns,http", "DERP_DNS_RESOLVERS=192.0.2.1:53, [2001:db8::1]:53",
		"DERP_DNS_PROPAGATION_TIMEOUT=0", "DERP_DNS_DELEGATE=_acme-challenge.derp.example.net.")
	if !c.acmeDNS || !c.acmeHTTP || c.acmeTLS {
		t.Errorf("dns,http: DNS %t, HTTP %t, TLS %t", c.acmeDNS, c.acmeHTTP, c.acmeTLS)
	}
	if d := c.acme.DNS; d.PropagationTimeout != 0 || !slices.Equal(d.Resolvers, []string{"192.0.2.1:53", "[2001:db8::1]:53"}) || d.Delegate != "_acme-challenge.derp.example.net" {
		t.Errorf("got %+v", d)
	}

	shown := c.loaded.effective(nil)
	for _, want := range []string{
		"DERP_ACME_CHALLENGES=dns,http  # set\n",
		"DERP_DNS_RFC2136_SERVER=ns.example.com:53  # set\n",
		"DERP_DNS_RFC2136_KEY_ALG=hmac-sha256  # default\n",
		"DERP_DNS_RFC2136_KEY=(secret)  # set\n",
	} {
		if !strings.Contains(shown, want) {
			t.Errorf("derpd env lacks %q:\n%s", want, shown)
		}
	}
	if strings.Contains(shown, "c2VjcmV0") || strings.Contains(shown, "DERP_DNS_OVH") {
		t.Errorf("derpd env shows a secret, or another provider:\n%s", shown)
	}
}
