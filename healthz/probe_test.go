package healthz

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tailscale.com/derp/derphttp"
	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stun"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"derpd/internal/testkit"
)

// relay is an upstream relay. It admits by the URL, if there is one, and serves
// TLS with the certificate, if there is one.
func relay(t *testing.T, admit string, certificate *tls.Certificate) DERPProbe {
	t.Helper()
	s := derpserver.New(key.NewNode(), logger.Discard)
	if admit != "" {
		s.SetVerifyClientURL(admit)
		s.SetVerifyClientURLFailOpen(false)
	}
	p := DERPProbe{Host: "derp.example.com", From: key.NewNode(), To: key.NewNode()}
	h := httptest.NewUnstartedServer(derpserver.Handler(s))
	if certificate == nil {
		h.Start()
	} else {
		h.TLS = &tls.Config{Certificates: []tls.Certificate{*certificate}, MinVersion: tls.VersionTLS12}
		h.StartTLS()
		p.Leaf = certificate.Leaf
		p.Judge = judging(Clients{HostName: p.Host, Roots: testkit.Pool(certificate)})
	}
	t.Cleanup(func() { _ = s.Close(); h.Close() })
	p.Dial = dialing(h.Listener.Addr().String())
	return p
}

// judging judges by what clients have.
func judging(c Clients) func([]*x509.Certificate) Verdict {
	return func(sent []*x509.Certificate) Verdict { return c.Judge(sent, time.Now()) }
}

// by makes a probe expect a certificate, and judge by the pin of a map.
func by(leaf *x509.Certificate, pin string) func(*DERPProbe) {
	return func(p *DERPProbe) {
		p.Leaf, p.CertName = leaf, pin
		p.Judge = judging(Clients{HostName: p.Host, CertName: pin})
	}
}

func dialing(addr string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", addr) }
}

// closedPort is an address of the loopback interface where nothing listens.
func closedPort(t *testing.T) string {
	t.Helper()
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	return ln.Addr().String()
}

// silence accepts connections and sends nothing.
func silence(t *testing.T) string {
	t.Helper()
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln.Addr().String() // the backlog accepts
}

func TestDERPProbe(t *testing.T) {
	refuse := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(refuse.Close)
	hang := make(chan struct{})
	hanging := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hang }))
	t.Cleanup(hanging.Close)
	release := sync.OnceFunc(func() { close(hang) })
	t.Cleanup(release)
	good, other := testkit.SelfSigned(t, "derp.example.com"), testkit.SelfSigned(t, "derp.example.com")
	expired := testkit.NewCertificate(t, testkit.Certificate{Names: []string{"derp.example.com"}, NotAfter: time.Now().Add(-time.Minute)})
	// Only clients without a pin require serverAuth.
	mail := testkit.NewCertificate(t, testkit.Certificate{Names: []string{"derp.example.com"}, Change: func(c *x509.Certificate) {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection}
	}})
	pin := func(c *tls.Certificate) string { return "sha256-raw:" + testkit.Hash(c.Leaf) }
	for _, tt := range []struct {
		name        string
		admit       string
		certificate *tls.Certificate
		change      func(p *DERPProbe)
		want        string // in the error
	}{
		{name: "plain HTTP"},
		{name: "TLS", certificate: good},
		{name: "TLS without an expected certificate", certificate: good, change: func(p *DERPProbe) { p.Leaf = nil }},
		{name: "another certificate that clients accept", certificate: good, change: func(p *DERPProbe) { p.Leaf = other.Leaf }},
		{name: "another name", certificate: good, change: func(p *DERPProbe) {
			p.Host = "other.example.com"
			by(good.Leaf, "")(p)
		}, want: "the certificate is for derp.example.com, but clients ask for other.example.com"},
		{name: "expired", certificate: expired, want: "the certificate of derp.example.com expired on "},
		{name: "no serverAuth", certificate: mail, want: "lacks the extended key usage serverAuth"},
		{name: "a pin", certificate: mail, change: by(nil, pin(mail))},
		{name: "a pin and another certificate", certificate: other, change: by(good.Leaf, pin(good)), want: "but the map has the pin " + testkit.Hash(good.Leaf)[:16]},
		{name: "a pin and an expired certificate", certificate: expired, change: by(expired.Leaf, pin(expired)), want: "the certificate of derp.example.com expired on "},
		{name: "TLS at a plain listener", change: by(good.Leaf, ""), want: "first record does not look like a TLS handshake"},
		{name: "refused", admit: refuse.URL, want: "the relay closed the connection after the DERP handshake: "},
		{name: "admission hangs", admit: hanging.URL, want: "context deadline exceeded"},
		{name: "no packet", change: func(p *DERPProbe) {
			// Two relays that do not know each other have a client each.
			dials := []func(context.Context) (net.Conn, error){p.Dial, relay(t, "", nil).Dial}
			p.Dial = func(ctx context.Context) (net.Conn, error) {
				dial := dials[0]
				dials = dials[1:]
				return dial(ctx)
			}
		}, want: "a packet between two clients: context deadline exceeded"},
		{name: "no listener", change: func(p *DERPProbe) { p.Dial = dialing(closedPort(t)) }, want: "connection refused"},
		{name: "silence", change: func(p *DERPProbe) { p.Dial = dialing(silence(t)) }, want: "context deadline exceeded"},
		{name: "silence in place of TLS", change: func(p *DERPProbe) {
			by(good.Leaf, "")(p)
			p.Dial = dialing(silence(t))
		}, want: "context deadline exceeded"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			patience := 30 * time.Second
			hangs := strings.HasSuffix(tt.want, "context deadline exceeded")
			if hangs {
				patience = 200 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			p := relay(t, tt.admit, tt.certificate)
			if tt.change != nil {
				tt.change(&p)
			}
			began := time.Now()
			took, err := p.Run(ctx)
			all := time.Since(began)
			if tt.admit == hanging.URL {
				release() // the relay's stop waits for the answer
			}
			switch {
			case tt.want == "":
				if err != nil || took <= 0 || took > all {
					t.Errorf("%s, %v", took, err)
				}
			case err == nil || !strings.Contains(err.Error(), tt.want):
				t.Errorf("got %v, want %q in it", err, tt.want)
			case hangs && all > 4*time.Second:
				t.Errorf("the end of the context after %s had no effect for %s", patience, all)
			}
		})
	}
}

// A probe fails unless the same packet arrives from the same client.
func TestDERPProbeComparesThePacket(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	one, another := relay(t, "", nil), relay(t, "", nil)
	connect := func(p DERPProbe) *derphttp.Client {
		t.Helper()
		c, err := p.connect(ctx, key.NewNode())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	for _, tt := range []struct {
		name       string
		sameClient bool
		before     []byte // sent to the receiver before the probe's packet
		want       string
	}{
		{"nothing else", true, nil, ""},
		{"another packet", true, []byte("another"), "the packet that arrived is not the one that was sent"},
		{"an empty packet", true, []byte{}, "the packet that arrived is not the one that was sent"},
		{"another client's", false, []byte("another"), "the packet that arrived is not the one that was sent"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			from, to := connect(one), connect(one)
			if tt.before != nil {
				sender := from
				if !tt.sameClient {
					sender = connect(one)
				}
				if err := sender.Send(to.SelfPublicKey(), tt.before); err != nil {
					t.Fatal(err)
				}
				if !tt.sameClient {
					// The relay handles the two senders side by side.
					echo := connect(one)
					if err := sender.Send(echo.SelfPublicKey(), []byte("x")); err != nil {
						t.Fatal(err)
					}
					if _, err := echo.Recv(); err != nil {
						t.Fatal(err)
					}
				}
			}
			err := pass(ctx, from, to)
			if got := errorText(err); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
	t.Run("no packet", func(t *testing.T) {
		short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		defer cancel()
		if err := pass(short, connect(one), connect(another)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the end of the time", err)
		}
	})
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// stunServer answers each request with the packets that reply returns.
func stunServer(t *testing.T, reply func(stun.TxID, netip.AddrPort) [][]byte) netip.AddrPort {
	t.Helper()
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	go func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if tx, err := stun.ParseBindingRequest(buf[:n]); err == nil {
				for _, packet := range reply(tx, from) {
					_, _ = conn.WriteToUDPAddrPort(packet, from)
				}
			}
		}
	}()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

func TestSTUNProbe(t *testing.T) {
	good := func(tx stun.TxID, from netip.AddrPort) [][]byte { return [][]byte{stun.Response(tx, from)} }
	gateway := netip.MustParseAddrPort("172.17.0.1:4242")
	var lost atomic.Bool
	for _, tt := range []struct {
		name  string
		reply func(stun.TxID, netip.AddrPort) [][]byte
		want  string // in the error
	}{
		{"good", good, ""},
		{"a lost request", func(tx stun.TxID, from netip.AddrPort) [][]byte {
			if lost.CompareAndSwap(false, true) {
				return nil
			}
			return good(tx, from)
		}, ""},
		{"other packets first", func(tx stun.TxID, from netip.AddrPort) [][]byte {
			return [][]byte{[]byte("x"), stun.Response(stun.NewTxID(), gateway), stun.Response(tx, from)}
		}, ""},
		{"another address", func(tx stun.TxID, from netip.AddrPort) [][]byte {
			return [][]byte{stun.Response(tx, netip.AddrPortFrom(gateway.Addr(), from.Port()))}
		}, "the response names 172.17.0.1:"},
		{"another port", func(tx stun.TxID, from netip.AddrPort) [][]byte {
			return [][]byte{stun.Response(tx, netip.AddrPortFrom(from.Addr(), from.Port()^1))}
		}, "the response names 127.0.0.1:"},
		{"nonsense", func(stun.TxID, netip.AddrPort) [][]byte { return [][]byte{[]byte("x")} }, "no response from 127.0.0.1:"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			patience := 30 * time.Second
			if strings.HasPrefix(tt.want, "no response") {
				patience = 50 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			took, err := STUN(ctx, stunServer(t, tt.reply))
			switch {
			case tt.want != "":
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v, want %q in it", err, tt.want)
				}
			case err != nil || took <= 0 || took >= stunRetry:
				t.Errorf("%s, %v; want the time of the last request alone", took, err)
			}
		})
	}
}

// A closed port fails at once, where the system reports it.
func TestSTUNProbeClosedPort(t *testing.T) {
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	if _, err := STUN(t.Context(), conn.LocalAddr().(*net.UDPAddr).AddrPort()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("got %v, want %v", err, syscall.ECONNREFUSED)
	}
}

// AskSTUN closes the connection, and its context ends it.
func TestAskSTUN(t *testing.T) {
	server := stunServer(t, func(tx stun.TxID, from netip.AddrPort) [][]byte { return [][]byte{stun.Response(tx, from)} })
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(server))
	if err != nil {
		t.Fatal(err)
	}
	seen, took, err := AskSTUN(t.Context(), conn)
	if err != nil || seen.String() != conn.LocalAddr().String() || took <= 0 {
		t.Errorf("%s, %s, %v; want %s", seen, took, err, conn.LocalAddr())
	}
	if _, err := conn.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("writing afterwards: %v, want a closed connection", err)
	}
	silent := stunServer(t, func(stun.TxID, netip.AddrPort) [][]byte { return nil })
	if conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(silent)); err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := AskSTUN(ended, conn); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the end of the context", err)
	}
}
