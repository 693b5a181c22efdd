package certs_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/libdns/libdns"
	"github.com/miekg/dns"
	"github.com/rs/zerolog"

	"derpd/certs"
	"derpd/certs/acmetest"
)

func dnsProvider(t *testing.T, name string, values map[string]string) certmagic.DNSProvider {
	t.Helper()
	i := slices.IndexFunc(certs.DNSProviders, func(p certs.DNSProvider) bool { return p.Name == name })
	if i == -1 {
		t.Fatalf("no provider %s", name)
	}
	return certs.DNSProviders[i].New(values)
}

// freePort finds a port of 127.0.0.1 that is free for UDP and TCP, for servers
// that bind for themselves.
func freePort(t *testing.T) string {
	t.Helper()
	for range 100 {
		tcp, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		udp, err := new(net.ListenConfig).ListenPacket(t.Context(), "udp", tcp.Addr().String())
		_ = tcp.Close()
		if err != nil {
			continue
		}
		_ = udp.Close()
		_, port, _ := net.SplitHostPort(tcp.Addr().String())
		return port
	}
	t.Fatal("no free port")
	return ""
}

// tsigSecret is the key "derpd." of the zones that may be changed.
const tsigSecret = "ZGVycGQgdGVzdCBrZXksIG5vdCBhIHNlY3JldCBvbmU="

// Recursion is on because BIND follows a CNAME into another of its zones only
// then; no test asks for a name that it does not hold.
const namedConfig = `
options {
	directory "DIR"; pid-file none; session-keyfile "DIR/session.key";
	listen-on port PORT { 127.0.0.1; }; listen-on-v6 { none; };
	recursion yes; dnssec-validation no;
};
controls { };
key "derpd." { algorithm hmac-sha256; secret "SECRET"; };
zone "example.com" { type primary; file "example.com.zone"; allow-update { key derpd.; }; };
zone "example.org" { type primary; file "example.org.zone"; };
zone "acme.example.net" { type primary; file "acme.example.net.zone"; allow-update { key derpd.; }; };
`

// startNamed runs BIND and returns its address. It holds example.com, which
// may be changed; example.org, which may not, and whose challenges are a CNAME
// into acme.example.net; and that one, which may.
func startNamed(t *testing.T) string {
	t.Helper()
	installed, err := exec.LookPath("named")
	if err != nil {
		installed = "/usr/sbin/named"
	}
	binary, err := os.ReadFile(installed)
	if err != nil {
		t.Fatalf("this test needs BIND's named: install the Debian package bind9 (%v)", err)
	}
	dir, port := t.TempDir(), freePort(t)
	zone := func(name, records string) {
		content := "$TTL 60\n@ SOA ns." + name + ". root." + name + ". 1 60 60 600 1\n@ NS ns." + name + ".\nns A 127.0.0.1\n" + records
		if err := os.WriteFile(filepath.Join(dir, name+".zone"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	zone("example.com", "derp A 127.0.0.1\n")
	zone("example.org", "derp A 127.0.0.1\n_acme-challenge.derp CNAME derp.acme.example.net.\n")
	zone("acme.example.net", "")
	config := strings.NewReplacer("DIR", dir, "PORT", port, "SECRET", tsigSecret).Replace(namedConfig)
	if err := os.WriteFile(filepath.Join(dir, "named.conf"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	// AppArmor's profile for /usr/sbin/named keeps it from reading
	// temporary directories; it does not know a copy.
	program := filepath.Join(dir, "named")
	if err := os.WriteFile(program, binary, 0o700); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	ctx, cancel := context.WithCancel(context.Background())
	command := exec.CommandContext(ctx, program, "-g", "-n", "1", "-c", filepath.Join(dir, "named.conf"))
	command.Stdout, command.Stderr = &log, &log
	if err := command.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = command.Wait()
		if t.Failed() {
			t.Logf("named:\n%s", &log)
		}
	})
	server := net.JoinHostPort("127.0.0.1", port)
	deadline, tick := time.After(30*time.Second), time.NewTicker(20*time.Millisecond)
	defer tick.Stop()
	for lookup(t, server, "example.com", dns.TypeSOA) == "" {
		select {
		case <-deadline:
			t.Fatal("named does not answer")
		case <-tick.C:
		}
	}
	return server
}

// lookup gives the answer of the server, or nothing when it has none.
func lookup(t *testing.T, server, name string, kind uint16) string {
	t.Helper()
	question := new(dns.Msg).SetQuestion(dns.Fqdn(name), kind)
	answer, _, err := (&dns.Client{Net: "tcp"}).ExchangeContext(t.Context(), question, server)
	if err != nil || len(answer.Answer) == 0 {
		return ""
	}
	return answer.Answer[0].String()
}

// A real authority looks into a real DNS server, where records are made by
// RFC 2136.
func TestDNS01ByUpdate(t *testing.T) {
	server := startNamed(t)
	good := map[string]string{"SERVER": server, "KEY_NAME": "derpd", "KEY": tsigSecret}
	refused := map[string]string{"SERVER": server, "KEY_NAME": "derpd", "KEY": "bm90IHRoZSBrZXk="}
	for _, tt := range []struct {
		name, domain, delegate, record string
		key                            map[string]string
		http                           bool
	}{
		{name: "in the zone", domain: "derp.example.com", record: "_acme-challenge.derp.example.com", key: good},
		{name: "delegated by a CNAME", domain: "derp.example.org", delegate: "derp.acme.example.net", record: "derp.acme.example.net", key: good},
		{name: "refused, HTTP-01 instead", domain: "derp.example.com", record: "_acme-challenge.derp.example.com", key: refused, http: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			authority := acmetest.StartResolving(t, server)
			l := listen(t)
			authority.Validate(portOf(l.http), portOf(l.https))
			c := certs.ACMEConfig{
				Names: []string{tt.domain}, Directory: authority.Directory, Roots: authority.ServerRoots,
				ListenHost: "127.0.0.1", Dir: t.TempDir(), Log: zerolog.Nop(),
				DNS: &certs.DNSConfig{
					Provider:           dnsProvider(t, "rfc2136", tt.key),
					Resolvers:          []string{server},
					PropagationTimeout: 20 * time.Second,
					Delegate:           tt.delegate,
				},
			}
			if tt.http {
				c.HTTPPort = portOf(l.http)
			}
			m := certs.NewACME(c)
			serveChallenges(t, m, l)
			waitReady(t, m)
			if err := m.Status().Leaf.VerifyHostname(tt.domain); err != nil {
				t.Error(err)
			}
			if left := lookup(t, server, tt.record, dns.TypeTXT); left != "" {
				t.Errorf("the challenge was left in the zone: %s", left)
			}
		})
	}
}

// What the DNS server says is what the operator reads.
func TestDNS01Refused(t *testing.T) {
	server := startNamed(t)
	authority := acmetest.StartResolving(t, server)
	l := listen(t)
	authority.Validate(portOf(l.http), portOf(l.https))
	const key = "bm90IHRoZSBrZXk="
	m := certs.NewACME(certs.ACMEConfig{
		Names: []string{"derp.example.com"}, Directory: authority.Directory, Roots: authority.ServerRoots,
		ListenHost: "127.0.0.1", Dir: t.TempDir(), Log: zerolog.Nop(),
		DNS: &certs.DNSConfig{
			Provider:  dnsProvider(t, "rfc2136", map[string]string{"SERVER": server, "KEY_NAME": "derpd", "KEY": key}),
			Resolvers: []string{server},
		},
	})
	serveChallenges(t, m, l)
	deadline, tick := time.After(30*time.Second), time.NewTicker(20*time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-deadline:
			t.Fatalf("status %v, want the server's refusal", m.Status().Err)
		case <-tick.C:
		}
		text := m.Status().Err.Error()
		if strings.Contains(text, key) {
			t.Fatalf("the status shows the key: %s", text)
		}
		if strings.Contains(text, `adding temporary record for zone "example.com."`) && strings.Contains(text, "bad authentication") {
			return
		}
	}
}

// acmeDNS plays an acme-dns server (its HTTP API and its own zone), and serves
// example.com too, whose challenges are a CNAME into that zone.
type acmeDNS struct {
	url, addr string

	mu  sync.Mutex
	txt []string // the two newest, as acme-dns keeps them
}

const acmeDNSName = "8e5700ea-a4bf-41c7-8a77-e990661dcc6a.auth.example.net."

func startAcmeDNS(t *testing.T) *acmeDNS {
	t.Helper()
	a := &acmeDNS{}
	api := httptest.NewServer(http.HandlerFunc(a.update))
	t.Cleanup(api.Close)
	a.url = api.URL

	a.addr = net.JoinHostPort("127.0.0.1", freePort(t))
	for _, network := range []string{"udp", "tcp"} {
		started := make(chan struct{})
		server := &dns.Server{Addr: a.addr, Net: network, Handler: dns.HandlerFunc(a.answer), NotifyStartedFunc: func() { close(started) }}
		failed := make(chan error, 1)
		go func() { failed <- server.ListenAndServe() }()
		select {
		case <-started:
		case err := <-failed:
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = server.Shutdown() })
	}
	return a
}

func (a *acmeDNS) update(w http.ResponseWriter, r *http.Request) {
	var body struct{ Subdomain, Txt string }
	switch err := json.NewDecoder(r.Body).Decode(&body); {
	case r.Method != http.MethodPost || r.URL.Path != "/update":
		http.NotFound(w, r)
	case r.Header.Get("X-Api-User") != "user" || r.Header.Get("X-Api-Key") != "password" || body.Subdomain+".auth.example.net." != acmeDNSName:
		http.Error(w, `{"error": "forbidden"}`, http.StatusUnauthorized)
	case err != nil || len(body.Txt) != 43:
		http.Error(w, `{"error": "bad_txt"}`, http.StatusBadRequest)
	default:
		a.mu.Lock()
		defer a.mu.Unlock()
		a.txt = append(a.txt, body.Txt)
		a.txt = a.txt[max(0, len(a.txt)-2):]
		_, _ = fmt.Fprintf(w, `{"txt": %q}`, body.Txt)
	}
}

func (a *acmeDNS) answer(w dns.ResponseWriter, r *dns.Msg) {
	m := new(dns.Msg).SetReply(r)
	m.Authoritative = true
	name, kind := r.Question[0].Name, r.Question[0].Qtype
	add := func(record string) {
		rr, err := dns.NewRR(record)
		if err != nil {
			m.Rcode = dns.RcodeServerFailure
			return
		}
		m.Answer = append(m.Answer, rr)
	}
	if name == "_acme-challenge.derp.example.com." {
		add(name + " 1 CNAME " + acmeDNSName)
		name = acmeDNSName
	}
	switch {
	case kind == dns.TypeSOA && (name == "example.com." || name == "auth.example.net."):
		add(name + " 1 SOA ns." + name + " root." + name + " 1 60 60 600 1")
	case kind == dns.TypeTXT && name == acmeDNSName:
		a.mu.Lock()
		defer a.mu.Unlock()
		for _, txt := range a.txt {
			add(name + " 1 TXT " + txt)
		}
	}
	_ = w.WriteMsg(m)
}

// acme-dns works with DERP_DNS_DELEGATE and without: it knows the account
// alone, and the CNAME is followed when looking for the record.
func TestDNS01ByAcmeDNS(t *testing.T) {
	for _, delegate := range []string{"", strings.TrimSuffix(acmeDNSName, ".")} {
		t.Run("delegate="+delegate, func(t *testing.T) {
			server := startAcmeDNS(t)
			authority := acmetest.StartResolving(t, server.addr)
			l := listen(t)
			authority.Validate(portOf(l.http), portOf(l.https))
			m := certs.NewACME(certs.ACMEConfig{
				Names: []string{"derp.example.com"}, Directory: authority.Directory, Roots: authority.ServerRoots,
				ListenHost: "127.0.0.1", Dir: t.TempDir(), Log: zerolog.Nop(),
				DNS: &certs.DNSConfig{
					Provider: dnsProvider(t, "acmedns", map[string]string{
						"SERVER_URL": server.url + "/", "USERNAME": "user", "PASSWORD": "password",
						"SUBDOMAIN": strings.TrimSuffix(acmeDNSName, ".auth.example.net."),
					}),
					Resolvers:          []string{server.addr},
					PropagationTimeout: 20 * time.Second,
					Delegate:           delegate,
				},
			})
			serveChallenges(t, m, l)
			waitReady(t, m)
			if err := m.Status().Leaf.VerifyHostname("derp.example.com"); err != nil {
				t.Error(err)
			}
		})
	}
}

// Some APIs take their secrets in the URL, and the errors of net/http name it.
func TestDNSProvidersKeepSecrets(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // no request leaves
	const secret = "s3cret/token+1"
	provider := dnsProvider(t, "duckdns", map[string]string{"API_TOKEN": secret})
	record := []libdns.Record{libdns.RR{Type: "TXT", Name: "_acme-challenge", Data: "x"}}
	for name, call := range map[string]func(context.Context, string, []libdns.Record) ([]libdns.Record, error){
		"AppendRecords": provider.AppendRecords, "DeleteRecords": provider.DeleteRecords,
	} {
		_, err := call(ctx, "relay.duckdns.org.", record)
		if err == nil || !strings.Contains(err.Error(), "(secret)") || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v, want an error with its secret masked", name, err)
		}
	}
}
