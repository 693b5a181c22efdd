package node

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/types/key"

	"derpd/certs"
	"derpd/cmd/derpd/internal/config"
	"derpd/internal/testkit"
	"derpd/relay/admit"
)

// nextText returns the next text that a client gets.
func nextText(t *testing.T, c *derphttp.Client) string {
	t.Helper()
	texts := make(chan string, 1)
	go func() {
		for {
			message, err := c.Recv()
			if err != nil {
				texts <- err.Error()
				return
			}
			if m, ok := message.(derp.HealthMessage); ok {
				texts <- m.Problem
				return
			}
		}
	}()
	return testkit.Receive(t, "a text", texts)
}

// TestCertificateNotice asserts which certificates make a warning for clients.
func TestCertificateNotice(t *testing.T) {
	cause := errors.New("the authority is away")
	for name, tt := range map[string]struct {
		mode           string
		lifetime, left time.Duration
		err            error
		want           bool
	}{
		"valid":                              {config.ModeManual, 90 * day, 3 * day, nil, false},
		"files not replaced":                 {config.ModeManual, 90 * day, 47 * time.Hour, nil, true},
		"expired":                            {config.ModeManual, 90 * day, -time.Hour, nil, true},
		"files that live a day":              {config.ModeManual, day, 7 * time.Hour, nil, false},
		"files that live a day, last hours":  {config.ModeManual, day, 5 * time.Hour, nil, true},
		"new files that are refused":         {config.ModeManual, day, 20 * time.Hour, cause, true},
		"pinned":                             {config.ModePinned, 3650 * day, 47 * time.Hour, nil, true},
		"renewal to come":                    {config.ModeLetsEncrypt, 6 * day, 47 * time.Hour, nil, false},
		"renewal fails, time left":           {config.ModeLetsEncrypt, 90 * day, 49 * time.Hour, cause, false},
		"renewal fails":                      {config.ModeLetsEncrypt, 90 * day, 47 * time.Hour, cause, true},
		"renewal of a six-day one fails now": {config.ModeLetsEncrypt, 6 * day, 47 * time.Hour, cause, true},
	} {
		end := time.Now().Add(tt.left)
		leaf := &x509.Certificate{NotBefore: end.Add(-tt.lifetime), NotAfter: end}
		n := &Node{config: &config.Config{Certificate: config.Certificate{Mode: tt.mode}}, certs: statusCerts{status: certs.Status{Leaf: leaf, Err: tt.err}}}
		want := ""
		if tt.want {
			want = "the certificate of this relay was not renewed and ends at " + end.UTC().Format("2006-01-02 15:04") + " UTC; no node can connect after that"
		}
		if got := n.certificateNotice(); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	for name, n := range map[string]*Node{"no TLS": {}, "no certificate yet": {certs: statusCerts{status: certs.Status{Err: cause}}}} {
		if got := n.certificateNotice(); got != "" {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// TestConnectedClientsAreTold asserts that connected clients get the warning of a
// certificate that ends, its end, and the stop of the relay, and that metrics count
// them.
func TestConnectedClientsAreTold(t *testing.T) {
	n := begin(t, testkit.Environ(t, "DERP_DOMAIN=derp.example.com", "DERP_CERT_MODE=pinned"))
	c := testkit.RegionClient(t, region(t, parsePolicy(t, n.printed)), key.NewNode())
	testkit.MustAdmit(t, c)
	manager, real := n.certs, n.certs.Status()
	end := time.Now().Add(time.Hour)
	ending := &Node{config: n.config, relay: n.relay, certs: statusCerts{manager, certs.Status{Leaf: &x509.Certificate{NotBefore: end.Add(-9 * day), NotAfter: end}}}}
	ending.sendNotice(t.Context())
	if got := nextText(t, c); !strings.HasPrefix(got, "the certificate of this relay was not renewed") {
		t.Errorf("told %q", got)
	}
	renewed := &Node{config: n.config, relay: n.relay, certs: statusCerts{manager, real}}
	renewed.sendNotice(t.Context())
	if got := nextText(t, c); got != "" {
		t.Errorf("told %q after the renewal, want the empty text", got)
	}
	if text := scrape(t, n); !strings.Contains(text, `derpd_told_total{reason="certificate"} 1`) || !strings.Contains(text, `derpd_told_total{reason="refused"} 0`) || !strings.Contains(text, "derpd_held_connections 0\n") {
		t.Errorf("metrics:\n%s", text)
	}
	n.stop()
	if got := nextText(t, c); got != "this relay is stopping" {
		t.Errorf("told %q at the stop", got)
	}
}

// TestRefusedClientsAreTold asserts the text for each answer of a source, that
// DERP_TELL_CLIENTS=false sends none, and that the stop does not wait for clients
// that are held.
func TestRefusedClientsAreTold(t *testing.T) {
	for _, tt := range []struct {
		status int
		tell   bool
		want   string
	}{
		{http.StatusOK, true, "this relay does not admit this node, whose key is ["},
		{http.StatusInternalServerError, true, "this relay cannot ask who may use it now"},
		{http.StatusOK, false, "EOF"},
	} {
		source := httptest.NewServer(answer(tt.status, `{"Allow":false}`))
		t.Cleanup(source.Close)
		n := begin(t, testkit.Environ(t, "DERP_VERIFY_CLIENT_URL="+source.URL, fmt.Sprintf("DERP_TELL_CLIENTS=%t", tt.tell)))
		c := testkit.RegionClient(t, region(t, parsePolicy(t, n.printed)), key.NewNode())
		if got := nextText(t, c); !strings.Contains(got, tt.want) {
			t.Errorf("source answers %d, told %q, want %q", tt.status, got, tt.want)
		}
		held := 0
		if tt.tell {
			held = 1
		}
		if text := scrape(t, n); !strings.Contains(text, fmt.Sprintf("derpd_held_connections %d\n", held)) {
			t.Errorf("metrics lack %d held connections:\n%s", held, text)
		}
		begun := time.Now()
		n.stop()
		if took := time.Since(begun); took > 5*time.Second {
			t.Errorf("the stop took %s", took)
		}
	}
}

// TestBusyIsTold asserts that a new node that nobody was asked about for seconds is not
// told that it must be admitted.
func TestBusyIsTold(t *testing.T) {
	source := httptest.NewServer(answer(http.StatusOK, `{"Allow":false}`))
	t.Cleanup(source.Close)
	n := begin(t, testkit.Environ(t, "DERP_VERIFY_CLIENT_URL="+source.URL))
	r := region(t, parsePolicy(t, n.printed))
	flooding, end := context.WithCancel(t.Context())
	var strangers sync.WaitGroup
	for range 8 {
		strangers.Go(func() {
			for flooding.Err() == nil {
				node := key.NewNode().Public()
				for range 2 { // at first, and again
					_ = n.gate.Load().Admit(flooding, node, netip.MustParseAddr("127.0.0.1"))
				}
				<-time.After(5 * time.Millisecond)
			}
		})
	}
	t.Cleanup(func() { end(); strangers.Wait() })
	testkit.Until(t, "a new node is told that there are too many", func() bool {
		node := key.NewNode()
		if err := n.gate.Load().Admit(t.Context(), node.Public(), netip.MustParseAddr("127.0.0.1")); !errors.Is(err, admit.ErrTooMany) {
			return false
		}
		<-time.After(5 * time.Second) // without a question
		message, err := testkit.RegionClient(t, r, node).Recv()
		return strings.Contains(fmt.Sprintf("%v %v", message, err), "too many new nodes connect to this relay now; the next attempt may succeed")
	})
	if text := scrape(t, n); !strings.Contains(text, `derpd_told_total{reason="busy"} 1`) {
		t.Errorf("metrics:\n%s", text)
	}
}
