package node

import (
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
	leaf := func(left time.Duration) *x509.Certificate {
		return &x509.Certificate{
			DNSNames: []string{"derp.example.com"}, IPAddresses: []net.IP{net.IPv4(198, 18, 0, 1)},
			NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(left),
		}
	}
	lived := func(lifetime, left time.Duration) *x509.Certificate {
		c := leaf(left)
		c.NotBefore = c.NotAfter.Add(-lifetime)
		return c
	}
	const names, sixDays = "derp.example.com 198.18.0.1", 160 * time.Hour
	cause := errors.New("the authority is away")
	for name, tt := range map[string]struct {
		mode   string
		status certs.Status
		level  healthz.Level
		want   string
	}{
		"valid":             {config.ModeLetsEncrypt, certs.Status{Leaf: leaf(49 * time.Hour)}, healthz.OK, "letsencrypt, " + names + ", 2 days left"},
		"none yet":          {config.ModeLetsEncrypt, certs.Status{Err: cause}, healthz.Fail, "waiting for derp.example.com: the authority is away"},
		"renewal fails":     {config.ModeLetsEncrypt, certs.Status{Leaf: leaf(49 * time.Hour), Err: cause}, healthz.Warn, "letsencrypt, " + names + ", 2 days left; the authority is away"},
		"expired":           {config.ModeLetsEncrypt, certs.Status{Leaf: leaf(-time.Hour), Err: cause}, healthz.Fail, names + " expired on "},
		"manual, near":      {config.ModeManual, certs.Status{Leaf: lived(90*day, 10*day+time.Hour)}, healthz.Warn, "manual, " + names + ", 10 days left; renew the files"},
		"manual, fresh":     {config.ModeManual, certs.Status{Leaf: lived(90*day, 23*day)}, healthz.OK, "22 days left"},
		"manual, old":       {config.ModeManual, certs.Status{Leaf: lived(90*day, 22*day)}, healthz.Warn, "21 days left; renew the files"},
		"manual, a year":    {config.ModeManual, certs.Status{Leaf: lived(365*day, 31*day)}, healthz.OK, "30 days left"},
		"manual, its end":   {config.ModeManual, certs.Status{Leaf: lived(365*day, 30*day)}, healthz.Warn, "29 days left; renew the files"},
		"six days, new":     {config.ModeManual, certs.Status{Leaf: lived(sixDays, sixDays)}, healthz.OK, "6 days left"},
		"six days, fresh":   {config.ModeManual, certs.Status{Leaf: lived(sixDays, 41*time.Hour)}, healthz.OK, "40 hours left"},
		"six days, old":     {config.ModeManual, certs.Status{Leaf: lived(sixDays, 40*time.Hour)}, healthz.Warn, "39 hours left; renew the files"},
		"minutes":           {config.ModeManual, certs.Status{Leaf: lived(sixDays, 119*time.Minute)}, healthz.Warn, "118 minutes left; renew the files"},
		"seconds":           {config.ModeManual, certs.Status{Leaf: lived(sixDays, 100*time.Second)}, healthz.Warn, "99 seconds left; renew the files"},
		"overdue":           {config.ModeLetsEncrypt, certs.Status{Leaf: lived(90*day, 20*day)}, healthz.Warn, "letsencrypt, " + names + ", 19 days left; its renewal is overdue; the log has the cause"},
		"in the window":     {config.ModeLetsEncrypt, certs.Status{Leaf: lived(90*day, 29*day)}, healthz.OK, "28 days left"},
		"manual, expired":   {config.ModeManual, certs.Status{Leaf: leaf(-time.Hour)}, healthz.Fail, names + " expired on "},
		"manual, bad files": {config.ModeManual, certs.Status{Leaf: leaf(1000 * time.Hour), Err: cause}, healthz.Warn, "41 days left; the authority is away"},
	} {
		c := *n.config
		c.Certificate.Mode = tt.mode
		fake := &Node{config: &c, certs: statusCerts{manager, tt.status}, selfCheck: n.selfCheck, relay: n.relay}
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
	counted := &Node{config: n.config, certs: statusCerts{manager, certs.Status{Leaf: leaf(time.Hour), Reloads: 2, ReloadErrors: 3}}, selfCheck: n.selfCheck, relay: n.relay}
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
	n := &Node{listeners: l}
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
	_, err := listen(t.Context(), config.Listen{HTTPS: "127.0.0.1:0", Admin: "127.0.0.1:0", Congestion: "nonsense"})
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
	for name, tt := range map[string]struct {
		leaf    *x509.Certificate
		domains []string
		want    string
	}{
		"the name that clients dial": {both, []string{"b.example.com"}, "b.example.com"},
		"even if it is not covered":  {both, []string{"c.example.com"}, "c.example.com"},
		"clients dial an address":    {both, []string{"198.18.0.1"}, "a.example.com"},
		"no domain":                  {both, nil, "a.example.com"},
		"an address alone":           {address, nil, "198.18.0.1"},
		"nothing":                    {new(x509.Certificate), nil, "localhost"},
	} {
		if got := probedName(tt.leaf, tt.domains, false); got != tt.want {
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
	}
}
