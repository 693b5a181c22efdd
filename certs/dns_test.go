package certs_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/libdns/libdns"
	"github.com/miekg/dns"
	"github.com/rs/zerolog"

	"derpd/certs"
	"derpd/internal/testkit"
	"derpd/internal/testkit/acmetest"
)

// A real authority validates against a real DNS server. Records are created by RFC
// 2136.
func TestDNS01ByUpdate(t *testing.T) {
	server := acmetest.StartNamed(t)
	good := &certs.RFC2136{Server: server.Addr, KeyName: acmetest.KeyName, KeyAlg: "hmac-sha256", Key: acmetest.Key}
	refused := &certs.RFC2136{Server: server.Addr, KeyName: acmetest.KeyName, KeyAlg: "hmac-sha256", Key: "bm90IHRoZSBrZXk="}
	for _, tt := range []struct {
		name, domain, delegate, record string
		key                            certs.DNSVariables
		http                           bool
	}{
		{name: "in the zone", domain: "derp.example.com", record: "_acme-challenge.derp.example.com", key: good},
		{name: "delegated by a CNAME", domain: "derp.example.org", delegate: "derp.acme.example.net", record: "derp.acme.example.net", key: good},
		{name: "refused, HTTP-01 instead", domain: "derp.example.com", record: "_acme-challenge.derp.example.com", key: refused, http: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			authority := acmetest.StartResolving(t, server.Addr)
			l := listen(t)
			authority.Validate(t, portOf(l.http), portOf(l.https))
			c := certs.ACMEConfig{
				Names: []string{tt.domain}, Directory: authority.Directory, Roots: authority.ServerRoots,
				ListenHost: "127.0.0.1", Dir: t.TempDir(), Log: zerolog.Nop(),
				DNS: &certs.DNSConfig{
					Provider:           certs.NewDNSProvider(tt.key),
					Resolvers:          []string{server.Addr},
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
			if left := server.Lookup(t, tt.record, dns.TypeTXT); left != "" {
				t.Errorf("the challenge was left in the zone: %s", left)
			}
		})
	}
}

// The operator reads the reason that the DNS server gives, and no secret.
func TestDNS01Refused(t *testing.T) {
	server := acmetest.StartNamed(t)
	authority := acmetest.StartResolving(t, server.Addr)
	l := listen(t)
	authority.Validate(t, portOf(l.http), portOf(l.https))
	const key = "bm90IHRoZSBrZXk="
	m := certs.NewACME(certs.ACMEConfig{
		Names: []string{"derp.example.com"}, Directory: authority.Directory, Roots: authority.ServerRoots,
		ListenHost: "127.0.0.1", Dir: t.TempDir(), Log: zerolog.Nop(),
		DNS: &certs.DNSConfig{
			Provider:  certs.NewDNSProvider(&certs.RFC2136{Server: server.Addr, KeyName: acmetest.KeyName, KeyAlg: "hmac-sha256", Key: key}),
			Resolvers: []string{server.Addr},
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

// acmeDNS is an acme-dns server: its HTTP API and its own zone. It serves example.com
// too. The challenges of example.com are a CNAME into the other zone.
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

	a.addr = testkit.FreeAddr(t)
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

// acme-dns works with DERP_DNS_DELEGATE and without. It uses only the account, and
// the check for the record follows the CNAME.
func TestDNS01ByAcmeDNS(t *testing.T) {
	for _, delegate := range []string{"", strings.TrimSuffix(acmeDNSName, ".")} {
		t.Run("delegate="+delegate, func(t *testing.T) {
			server := startAcmeDNS(t)
			authority := acmetest.StartResolving(t, server.addr)
			l := listen(t)
			authority.Validate(t, portOf(l.http), portOf(l.https))
			m := certs.NewACME(certs.ACMEConfig{
				Names: []string{"derp.example.com"}, Directory: authority.Directory, Roots: authority.ServerRoots,
				ListenHost: "127.0.0.1", Dir: t.TempDir(), Log: zerolog.Nop(),
				DNS: &certs.DNSConfig{
					Provider: certs.NewDNSProvider(&certs.ACMEDNS{
						ServerURL: server.url + "/", Username: "user", Password: "password",
						Subdomain: strings.TrimSuffix(acmeDNSName, ".auth.example.net."),
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
	provider := certs.NewDNSProvider(&certs.DuckDNS{APIToken: secret})
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
