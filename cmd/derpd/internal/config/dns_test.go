package config

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"derpd/certs"
)

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

// fieldsOf returns the fields of the provider in a configuration, as JSON.
func fieldsOf(t *testing.T, c *Config) string {
	t.Helper()
	data, err := json.Marshal(c.Certificate.ACME.DNS.Provider)
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
	for _, provider := range certs.DNSProviders() {
		t.Run(provider.Name, func(t *testing.T) {
			env := []string{"DERP_DOMAIN=derp.example.com", "DERP_DATA_DIR=" + t.TempDir(), "DERP_DNS_PROVIDER=" + provider.Name}
			files := slices.Clone(env)
			dir := t.TempDir()
			for _, v := range variablesOf(provider.Variables()) {
				name := v.Name
				value, ok := providerValues[name]
				if !ok {
					value = strings.ToLower(strings.TrimPrefix(name, "DERP_DNS_"+strings.ToUpper(provider.Name)+"_"))
				}
				env = append(env, name+"="+value)
				path := filepath.Join(dir, name)
				if err := os.WriteFile(path, []byte(value+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				files = append(files, name+"_FILE="+path)
			}
			for given, env := range map[string][]string{"values": env, "files": files} {
				c, err := Load(env)
				if !provider.Included() {
					if want := "DERP_DNS_PROVIDER: " + provider.Name + " is not in this build, since it adds megabytes; build derpd with `-tags " + provider.Tag + "`, or the image with `--build-arg TAGS=" + provider.Tag + "`"; err == nil || err.Error() != want {
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
	load := func(pairs ...string) *Config {
		t.Helper()
		c, err := Load(append(pairs, base...))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}

	c := load("DERP_DOMAIN=derp.example.com")
	if !c.Certificate.Challenges.DNS || c.Certificate.Challenges.HTTP || c.Certificate.Challenges.TLSALPN {
		t.Errorf("a provider leaves the other challenges out: DNS %t, HTTP %t, TLS %t", c.Certificate.Challenges.DNS, c.Certificate.Challenges.HTTP, c.Certificate.Challenges.TLSALPN)
	}
	if d := c.Certificate.ACME.DNS; d.PropagationTimeout != 2*time.Minute || d.Resolvers != nil || d.Delegate != "" {
		t.Errorf("defaults: %+v", d)
	}
	if got, want := fieldsOf(t, c), `{"key_name":"derpd","key_alg":"hmac-sha256","key":"c2VjcmV0","server":"ns.example.com:53"}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}

	c = load("DERP_DOMAIN=derp.example.com,203.0.113.7", "DERP_ACME_CHALLENGES=dns,http", "DERP_DNS_RESOLVERS=192.0.2.1:53, [2001:db8::1]:53",
		"DERP_DNS_PROPAGATION_TIMEOUT=0", "DERP_DNS_DELEGATE=_acme-challenge.derp.example.net.")
	if !c.Certificate.Challenges.DNS || !c.Certificate.Challenges.HTTP || c.Certificate.Challenges.TLSALPN {
		t.Errorf("dns,http: DNS %t, HTTP %t, TLS %t", c.Certificate.Challenges.DNS, c.Certificate.Challenges.HTTP, c.Certificate.Challenges.TLSALPN)
	}
	if d := c.Certificate.ACME.DNS; d.PropagationTimeout != 0 || !slices.Equal(d.Resolvers, []string{"192.0.2.1:53", "[2001:db8::1]:53"}) || d.Delegate != "_acme-challenge.derp.example.net" {
		t.Errorf("got %+v", d)
	}

	text := shown(t, c)
	for _, want := range []string{
		"DERP_ACME_CHALLENGES=dns,http  # set\n",
		"DERP_DNS_RFC2136_SERVER=ns.example.com:53  # set\n",
		"DERP_DNS_RFC2136_KEY_ALG=hmac-sha256  # default\n",
		"DERP_DNS_RFC2136_KEY=(secret)  # set\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("derpd env lacks %q:\n%s", want, text)
		}
	}
	if strings.Contains(text, "c2VjcmV0") || strings.Contains(text, "DERP_DNS_OVH") {
		t.Errorf("derpd env shows a secret, or another provider:\n%s", text)
	}
}
