package main

import (
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/stun"
	"tailscale.com/types/key"

	"derpd/healthz"
	"derpd/internal/testkit"
	"derpd/relay"
)

// answersSTUN asks with a real packet. A closed server leaves no trace, so
// silence is that three of them have no answer for a while.
func answersSTUN(t *testing.T, n *testNode) bool {
	t.Helper()
	conn, err := net.DialUDP("udp", nil, n.listeners.stun.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	buf := make([]byte, 1500)
	for range 3 {
		if _, err := conn.Write(stun.Request(stun.NewTxID())); err != nil {
			t.Fatal(err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(buf); err == nil {
			return true
		}
	}
	return false
}

// stunGoes waits until STUN answers, or does not, and returns how long that
// took since the moment.
func stunGoes(t *testing.T, n *testNode, answers bool, since time.Time) time.Duration {
	t.Helper()
	what := "STUN is silent"
	if answers {
		what = "STUN answers"
	}
	testkit.Until(t, what, func() bool { return answersSTUN(t, n) == answers })
	return time.Since(since).Round(10 * time.Millisecond)
}

// breakable is a listener that accepts nothing while it is broken.
type breakable struct {
	net.Listener
	broken atomic.Bool
	mended chan struct{}
}

func (l *breakable) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil && l.broken.Load() {
		<-l.mended
	}
	return conn, err
}

// Whatever keeps the relay from serving, STUN is silent within seconds, and
// answers again when it is gone. Who was connected stays so.
func TestSTUNFollowsDERP(t *testing.T) {
	for _, tt := range []struct {
		name  string
		cause string // in the health of STUN

		// breaks is called before the relay runs, and returns what breaks
		// and what mends it.
		breaks func(t *testing.T, n *node) (breaks, mends func())
	}{
		{"TLS fails", "tls: internal error", func(_ *testing.T, n *node) (breaks, mends func()) {
			var broken atomic.Bool
			works := n.https.TLSConfig.GetCertificate
			n.https.TLSConfig.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
				if broken.Load() {
					return nil, errors.New("broken")
				}
				return works(hello)
			}
			return func() { broken.Store(true) }, func() { broken.Store(false) }
		}},
		{"another name's certificate", "x509", func(t *testing.T, n *node) (breaks, mends func()) {
			dir := t.TempDir()
			pair("other", "other.example.com", time.Now())(t, dir)
			other, err := tls.LoadX509KeyPair(dir+"/other.crt", dir+"/other.key")
			if err != nil {
				t.Fatal(err)
			}
			var broken atomic.Bool
			works := n.https.TLSConfig.GetCertificate
			n.https.TLSConfig.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
				if broken.Load() {
					return &other, nil
				}
				return works(hello)
			}
			return func() { broken.Store(true) }, func() { broken.Store(false) }
		}},
		{"the listener hangs", "context deadline exceeded", func(t *testing.T, n *node) (breaks, mends func()) {
			l := &breakable{Listener: n.listeners.https, mended: make(chan struct{})}
			n.listeners.https = l
			mend := func() {
				if l.broken.Swap(false) {
					close(l.mended)
				}
			}
			t.Cleanup(mend)
			return func() { l.broken.Store(true) }, mend
		}},
		{"packets do not arrive", "a packet between two clients: ", func(t *testing.T, n *node) (breaks, mends func()) {
			// While it is broken, every second client gets to another
			// server with the same key.
			private, err := relay.LoadKey(n.config.nodeKeyFile())
			if err != nil {
				t.Fatal(err)
			}
			other, err := relay.New(relay.Config{PrivateKey: private, Home: http.NotFoundHandler(), BootstrapDNS: http.NotFoundHandler(), Log: zerolog.Nop()})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = other.Close() })
			var broken atomic.Bool
			var count atomic.Int64
			works := n.https.Handler
			n.https.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if broken.Load() && count.Add(1)%2 == 0 {
					other.Handler().ServeHTTP(w, r)
					return
				}
				works.ServeHTTP(w, r)
			})
			return func() { broken.Store(true) }, func() { broken.Store(false) }
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var breaks, mends func()
			n := begin(t, loopbackEnv(t, "DERP_DOMAIN=derp.example.com", "DERP_CERT_MODE=pinned"), func(n *node) { breaks, mends = tt.breaks(t, n) })
			if !answersSTUN(t, n) {
				t.Fatal("a relay that is ready does not answer STUN")
			}
			r := region(t, parsePolicy(t, n.printed))
			a, b := testkit.RegionClient(t, r, key.NewNode()), testkit.RegionClient(t, r, key.NewNode())
			for _, c := range []*derphttp.Client{a, b} {
				testkit.MustAdmit(t, c)
			}

			breaks()
			took := stunGoes(t, n, false, time.Now())
			t.Logf("silent after %s", took)
			if took > 20*time.Second { // 11 on a machine that is not busy
				t.Errorf("STUN answers for %s after the relay broke", took)
			}
			stun := n.checkSTUN(t.Context())
			if stun.Level != healthz.Fail || !strings.HasPrefix(stun.Detail, "closed, since the relay cannot serve clients: ") || !strings.Contains(stun.Detail, tt.cause) {
				t.Errorf("health says %+v, want %q", stun, tt.cause)
			}
			if report := n.health.Report(t.Context()); report.Ready {
				t.Error("a relay that cannot serve is ready")
			}
			testkit.Exchange(t, a, b)

			mends()
			took = stunGoes(t, n, true, time.Now())
			t.Logf("back after %s", took)
			if report := n.health.Report(t.Context()); !report.Ready {
				t.Error(report)
			}
		})
	}
}

// A certificate that ends closes STUN, and the files of a new one open it.
func TestSTUNFollowsTheCertificate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ends := time.Now().Add(4 * time.Second)
	pair("derp.example.com", "derp.example.com", ends.AddDate(-10, 0, 0))(t, dir)
	n := begin(t, loopbackEnv(t, "DERP_CERT_MODE=manual", "DERP_DOMAIN=derp.example.com", "DERP_CERT_DIR="+dir))
	if !answersSTUN(t, n) {
		t.Fatal("a relay with a valid certificate does not answer STUN")
	}
	t.Logf("silent %s after its end", stunGoes(t, n, false, ends))
	if stun := n.checkSTUN(t.Context()); !strings.Contains(stun.Detail, "expired") {
		t.Errorf("health says %+v, want that it expired", stun)
	}
	pair("derp.example.com", "derp.example.com", time.Now())(t, dir)
	t.Logf("back after %s", stunGoes(t, n, true, time.Now()))
}
