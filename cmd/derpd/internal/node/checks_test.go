package node

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"derpd/certs"
	"derpd/cmd/derpd/internal/config"
	"derpd/healthz"
	"derpd/internal/testkit"
	"derpd/relay"
)

// statusCerts is a manager with a given status.
type statusCerts struct {
	certs.Manager
	status certs.Status
}

func (c statusCerts) Status() certs.Status { return c.status }

// TestCheckCertificate asserts what health and metrics say about certificates that
// an authority has signed.
func TestCheckCertificate(t *testing.T) {
	n := begin(t, testkit.Environ(t, "DERP_DOMAIN=derp.example.com", "DERP_CERT_MODE=pinned"))
	manager := n.certs
	defer func() { n.stop(); n.certs = manager }()
	status := func(issuer *tls.Certificate, lifetime, left time.Duration, err error) certs.Status {
		made := testkit.NewCertificate(t, testkit.Certificate{
			Names:     []string{"derp.example.com", "198.18.0.1"},
			NotBefore: time.Now().Add(left - lifetime), NotAfter: time.Now().Add(left), Issuer: issuer,
		})
		return certs.Status{Leaf: made.Leaf, Chain: made.Certificate, Err: err}
	}
	private := testkit.NewAuthority(t)
	const names = "derp.example.com 198.18.0.1"
	cause := errors.New("the authority is away")
	for name, tt := range map[string]struct {
		mode   string
		status certs.Status
		level  healthz.Level
		want   string
	}{
		"valid":             {config.ModeLetsEncrypt, status(publicRoot, 73*time.Hour, 49*time.Hour, nil), healthz.OK, "letsencrypt, " + names + ", 2 days left"},
		"none yet":          {config.ModeLetsEncrypt, certs.Status{Err: cause}, healthz.Fail, "waiting for derp.example.com: the authority is away"},
		"renewal fails":     {config.ModeLetsEncrypt, status(publicRoot, 90*day, 49*time.Hour, cause), healthz.Warn, "letsencrypt, " + names + ", 2 days left; the authority is away"},
		"expired":           {config.ModeLetsEncrypt, status(publicRoot, 90*day, -time.Hour, cause), healthz.Fail, "; renew it; the authority is away"},
		"a private root":    {config.ModeLetsEncrypt, status(private, 73*time.Hour, 49*time.Hour, nil), healthz.Warn, "2 days left; clients need \"Test Root\" installed: this machine does not know it; "},
		"private and old":   {config.ModeManual, status(private, 90*day, 49*time.Hour, nil), healthz.Warn, "; renew the files"},
		"and no renewal":    {config.ModeLetsEncrypt, status(private, 90*day, 49*time.Hour, cause), healthz.Warn, "; the authority is away"},
		"manual, expired":   {config.ModeManual, status(publicRoot, 90*day, -time.Hour, nil), healthz.Fail, "the certificate of derp.example.com expired on "},
		"manual, bad files": {config.ModeManual, status(publicRoot, 90*day, 1000*time.Hour, cause), healthz.Warn, "41 days left; the authority is away"},
		"manual, near":      {config.ModeManual, status(publicRoot, 90*day, 10*day+time.Hour, nil), healthz.Warn, "manual, " + names + ", 10 days left; renew the files"},
		"manual, fresh":     {config.ModeManual, status(publicRoot, 90*day, 23*day, nil), healthz.OK, "22 days left"},
		"manual, old":       {config.ModeManual, status(publicRoot, 90*day, 22*day, nil), healthz.Warn, "21 days left; renew the files"},
		"manual, a year":    {config.ModeManual, status(publicRoot, 365*day, 31*day, nil), healthz.OK, "30 days left"},
		"manual, its end":   {config.ModeManual, status(publicRoot, 365*day, 30*day, nil), healthz.Warn, "29 days left; renew the files"},
		"six days, new":     {config.ModeManual, status(publicRoot, sixDays, sixDays, nil), healthz.OK, "6 days left"},
		"six days, fresh":   {config.ModeManual, status(publicRoot, sixDays, 41*time.Hour, nil), healthz.OK, "40 hours left"},
		"six days, old":     {config.ModeManual, status(publicRoot, sixDays, 40*time.Hour, nil), healthz.Warn, "39 hours left; renew the files"},
		"minutes":           {config.ModeManual, status(publicRoot, sixDays, 119*time.Minute, nil), healthz.Warn, "118 minutes left; renew the files"},
		"seconds":           {config.ModeManual, status(publicRoot, sixDays, 100*time.Second, nil), healthz.Warn, "99 seconds left; renew the files"},
		"overdue":           {config.ModeLetsEncrypt, status(publicRoot, 90*day, 20*day, nil), healthz.Warn, "letsencrypt, " + names + ", 19 days left; its renewal is overdue; the log has the cause"},
		"in the window":     {config.ModeLetsEncrypt, status(publicRoot, 90*day, 29*day, nil), healthz.OK, "28 days left"},
	} {
		c := *n.config
		c.Certificate.Mode = tt.mode
		fake := &Node{config: &c, listeners: n.listeners, certs: statusCerts{manager, tt.status}, selfCheck: n.selfCheck, relay: n.relay, eyes: newEyes(nil)}
		got := fake.checkCertificate(t.Context())
		if got.Level != tt.level || !strings.Contains(got.Detail, tt.want) {
			t.Errorf("%s: %+v, want %v %q", name, got, tt.level, tt.want)
		}
		failing, text := "0", metricsText(fake)
		if tt.status.Err != nil {
			failing = "1"
		}
		for metric, want := range map[string]string{
			"gauge_derpd_certificate_failing":               failing,
			"counter_derpd_certificate_reloads_total":       "0",
			"counter_derpd_certificate_reload_errors_total": "0",
		} {
			if text[metric] != want {
				t.Errorf("%s: %s is %q, want %s", name, metric, text[metric], want)
			}
		}
		if leaf := tt.status.Leaf; leaf != nil && text["gauge_derpd_certificate_not_after_timestamp_seconds"] != fmt.Sprint(leaf.NotAfter.Unix()) {
			t.Errorf("%s: the end of the certificate is %s", name, text["gauge_derpd_certificate_not_after_timestamp_seconds"])
		}
	}
	counted := &Node{config: n.config, listeners: n.listeners, certs: statusCerts{manager, certs.Status{Leaf: private.Leaf, Reloads: 2, ReloadErrors: 3}}, selfCheck: n.selfCheck, relay: n.relay}
	text := metricsText(counted)
	if text["counter_derpd_certificate_reloads_total"] != "2" || text["counter_derpd_certificate_reload_errors_total"] != "3" {
		t.Errorf("2 reloads and 3 failed ones are counted as %v", text)
	}
}

// metricsText returns the metrics of a node by name.
func metricsText(n *Node) map[string]string {
	list := make(map[string]string)
	for _, m := range n.metrics() {
		list[m.Key] = m.Value.String()
	}
	return list
}

// TestCheckListeners asserts that health names the listener that cannot be reached.
func TestCheckListeners(t *testing.T) {
	l, err := listen(t.Context(), config.Listen{HTTPS: "127.0.0.1:0", HTTP: "127.0.0.1:0", Admin: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	n := &Node{listeners: l, relay: new(relay.Relay)}
	want := fmt.Sprintf("https %s, http %s", l.https.Addr(), l.http.Addr())
	if got := n.checkListeners(t.Context()); got.Level != healthz.OK || got.Detail != want {
		t.Errorf("%+v, want %q", got, want)
	}
	_ = l.http.Close()
	if got := n.checkListeners(t.Context()); got.Level != healthz.Fail || !strings.HasPrefix(got.Detail, "http on "+l.http.Addr().String()+": ") {
		t.Errorf("without port 80: %+v", got)
	}
	_ = l.https.Close()
	if got := n.checkListeners(t.Context()); got.Level != healthz.Fail || !strings.HasPrefix(got.Detail, "https on "+l.https.Addr().String()+": ") {
		t.Errorf("without any: %+v", got)
	}
}

// TestUnknownCongestionControl asserts that a congestion control which the kernel
// lacks is refused, and that no socket stays open.
func TestUnknownCongestionControl(t *testing.T) {
	_, err := listen(t.Context(), config.Listen{HTTPS: "127.0.0.1:0", Admin: "127.0.0.1:0", TCP: config.TCP{Congestion: "nonsense"}})
	if _, bind := errors.AsType[BindError](err); !bind || !strings.Contains(err.Error(), "DERP_TCP_CONGESTION: using nonsense") {
		t.Errorf("got %v", err)
	}
}

// TestLoopback asserts where a probe reaches a listener.
func TestLoopback(t *testing.T) {
	for listening, want := range map[string]string{
		"0.0.0.0:1": "127.0.0.1:1", "[::]:2": "127.0.0.1:2", "[::1]:3": "[::1]:3", "127.0.0.2:4": "127.0.0.2:4", "[::ffff:127.0.0.3]:5": "127.0.0.3:5",
	} {
		tcp, err := net.ResolveTCPAddr("tcp", listening)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range []net.Addr{tcp, &net.UDPAddr{IP: tcp.IP, Port: tcp.Port}} {
			if got := loopback(a).String(); got != want {
				t.Errorf("%s %s: %s, want %s", a.Network(), listening, got, want)
			}
		}
	}
}

// TestProbedName asserts which name the self-check verifies.
func TestProbedName(t *testing.T) {
	both := &x509.Certificate{DNSNames: []string{"a.example.com", "b.example.com"}, IPAddresses: []net.IP{net.IPv4(198, 18, 0, 1)}}
	address := &x509.Certificate{IPAddresses: both.IPAddresses}
	name := &x509.Certificate{DNSNames: both.DNSNames}
	for name, tt := range map[string]struct {
		leaf    *x509.Certificate
		domains []string
		pinned  bool
		want    string
	}{
		"the name that clients dial": {both, []string{"b.example.com"}, false, "b.example.com"},
		"with a pin":                 {both, []string{"b.example.com"}, true, "b.example.com"},
		"even if it is not covered":  {both, []string{"c.example.com"}, false, "c.example.com"},
		"clients dial an address":    {both, []string{"198.18.0.1"}, false, "198.18.0.1"},
		"an address and a pin":       {name, []string{"198.18.0.1"}, true, "127.0.0.1"},
		"no domain":                  {both, nil, false, "198.18.0.1"},
		"no domain, a name alone":    {name, nil, false, "a.example.com"},
		"an address alone":           {address, nil, false, "198.18.0.1"},
		"nothing":                    {new(x509.Certificate), nil, false, "127.0.0.1"},
	} {
		if got := probedName(tt.leaf, tt.domains, tt.pinned); got != tt.want {
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
	}
}
