package node

import (
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/stun"
	"tailscale.com/types/key"

	"derpd/certs"
	"derpd/healthz"
	"derpd/internal/testkit"
	"derpd/relay"
)

// answersSTUN sends up to three STUN requests, and reports whether one gets a
// response. A closed server sends nothing, so that only a timeout shows it.
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

// stunGoes waits until STUN answers, or stops answering, and returns the time
// since the given moment.
func stunGoes(t *testing.T, n *testNode, answers bool, since time.Time) time.Duration {
	t.Helper()
	what := "STUN is silent"
	if answers {
		what = "STUN answers"
	}
	testkit.Until(t, what, func() bool { return answersSTUN(t, n) == answers })
	return time.Since(since).Round(10 * time.Millisecond)
}

// breakable is a listener whose Accept blocks while it is broken.
type breakable struct {
	net.Listener
	broken   atomic.Bool
	repaired chan struct{}
}

func (l *breakable) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil && l.broken.Load() {
		<-l.repaired
	}
	return conn, err
}

// breakableCerts has no certificate, or another one, while it is broken.
type breakableCerts struct {
	certs.Manager
	broken atomic.Bool
	other  *tls.Certificate
}

func (b *breakableCerts) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	switch {
	case !b.broken.Load():
		return b.Manager.GetCertificate(hello)
	case b.other != nil:
		return b.other, nil
	}
	return nil, errors.New("broken")
}

// everySecond hands every second connection to another listener while it is
// active.
type everySecond struct {
	net.Listener
	active *atomic.Bool
	second *handedOn
	count  int
}

func (l *everySecond) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil || !l.active.Load() {
			return conn, err
		}
		if l.count++; l.count%2 == 1 {
			return conn, nil
		}
		select {
		case l.second.conns <- conn:
		case <-l.second.closed:
			_ = conn.Close()
		}
	}
}

// handedOn accepts the connections that it is handed.
type handedOn struct {
	net.Listener
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *handedOn) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *handedOn) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Whatever keeps the relay from serving, STUN is silent within seconds, and
// answers again when it is gone. Who was connected stays so.
func TestSTUNFollowsDERP(t *testing.T) {
	for _, tt := range []struct {
		name  string
		cause string // part of health's detail about STUN

		// breaks is called before the relay runs, and returns functions
		// that break and repair it.
		breaks func(t *testing.T, n *Node) (breaks, repairs func())
	}{
		{"TLS fails", "tls: internal error", func(_ *testing.T, n *Node) (breaks, mends func()) {
			b := &breakableCerts{Manager: n.certs}
			n.certs = b
			return func() { b.broken.Store(true) }, func() { b.broken.Store(false) }
		}},
		{"another name's certificate", "the certificate has the hash ", func(t *testing.T, n *Node) (breaks, repairs func()) {
			dir := t.TempDir()
			pair("other", "other.example.com", time.Now())(t, dir)
			other, err := tls.LoadX509KeyPair(dir+"/other.crt", dir+"/other.key")
			if err != nil {
				t.Fatal(err)
			}
			b := &breakableCerts{Manager: n.certs, other: &other}
			n.certs = b
			return func() { b.broken.Store(true) }, func() { b.broken.Store(false) }
		}},
		{"the listener hangs", "context deadline exceeded", func(t *testing.T, n *Node) (breaks, repairs func()) {
			l := &breakable{Listener: n.listeners.https, repaired: make(chan struct{})}
			n.listeners.https = l
			repair := func() {
				if l.broken.Swap(false) {
					close(l.repaired)
				}
			}
			t.Cleanup(repair)
			return func() { l.broken.Store(true) }, repair
		}},
		{"packets do not arrive", "a packet between two clients: ", func(t *testing.T, n *Node) (breaks, mends func()) {
			// While it is broken, every second client gets to another
			// server with the same key.
			private, err := relay.LoadKey(n.config.Storage.NodeKeyFile())
			if err != nil {
				t.Fatal(err)
			}
			other, err := relay.New(relay.Config{
				PrivateKey: private, Home: http.NotFoundHandler(), BootstrapDNS: http.NotFoundHandler(),
				GetCertificate: n.certs.GetCertificate, Log: zerolog.Nop(),
			})
			if err != nil {
				t.Fatal(err)
			}
			second := &handedOn{Listener: n.listeners.https, conns: make(chan net.Conn), closed: make(chan struct{})}
			served := make(chan error, 1)
			go func() { served <- other.Serve(second) }()
			t.Cleanup(func() {
				_ = other.Close()
				if err := <-served; err != nil {
					t.Error(err)
				}
			})
			var broken atomic.Bool
			n.listeners.https = &everySecond{Listener: n.listeners.https, active: &broken, second: second}
			return func() { broken.Store(true) }, func() { broken.Store(false) }
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var breaks, repairs func()
			log := new(logBuffer)
			n := begin(t, testkit.Environ(t, "DERP_DOMAIN=derp.example.com", "DERP_CERT_MODE=pinned"), logTo(log), func(n *Node) { breaks, repairs = tt.breaks(t, n) })
			if !answersSTUN(t, n) {
				t.Fatal("a relay that is ready does not answer STUN")
			}
			r := region(t, parsePolicy(t, n.printed))
			a, b := testkit.RegionClient(t, r, key.NewNode()), testkit.RegionClient(t, r, key.NewNode())
			for _, c := range []*derphttp.Client{a, b} {
				testkit.MustAdmit(t, c)
			}

			if open := metricsText(n.Node)["gauge_derpd_stun_open"]; open != "1" || log.has("serves clients again") {
				t.Errorf("before a failure: gauge_derpd_stun_open is %s, log\n%s", open, log)
			}
			breaks()
			took := stunGoes(t, n, false, time.Now())
			t.Logf("silent after %s", took)
			if took > 20*time.Second { // 11 s on an idle machine
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
			if text := metricsText(n.Node); text["gauge_derpd_stun_open"] != "0" || text["counter_derpd_self_check_failures_total"] == "0" {
				t.Errorf("the metrics of a relay that cannot serve: %v", text)
			}
			if !log.has(`"level":"warn"`, `"stun":"closed"`, "the relay cannot serve clients", tt.cause) {
				t.Errorf("no warning in the log:\n%s", log)
			}

			repairs()
			took = stunGoes(t, n, true, time.Now())
			testkit.Until(t, "the log says that the relay serves again", func() bool {
				return log.has(`"level":"info"`, `"stun":"open"`, "the relay serves clients again")
			})
			t.Logf("back after %s", took)
			if report := n.health.Report(t.Context()); !report.Ready {
				t.Error(report)
			}
		})
	}
}

// TestSTUNFollowsTheCertificate asserts that an expired certificate closes
// STUN, and that a new one opens it.
func TestSTUNFollowsTheCertificate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ends := time.Now().Add(4 * time.Second)
	pair("derp.example.com", "derp.example.com", ends.AddDate(-10, 0, 0))(t, dir)
	n := begin(t, testkit.Environ(t, "DERP_CERT_MODE=manual", "DERP_DOMAIN=derp.example.com", "DERP_CERT_DIR="+dir))
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
