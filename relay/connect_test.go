package relay_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/derp/derpserver"
	"tailscale.com/net/netmon"
	"tailscale.com/tsweb"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"derpd/relay"
)

func newCertificate(t testing.TB) *tls.Certificate {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"derp.example.com"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private, Leaf: leaf}
}

func newRelay(t testing.TB, c relay.Config) *relay.Relay {
	t.Helper()
	home, err := relay.Home("blank")
	if err != nil {
		t.Fatal(err)
	}
	c.PrivateKey, c.Home, c.BootstrapDNS = key.NewNode(), home, relay.NewBootstrapDNS(nil, zerolog.Nop())
	r, err := relay.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// begin serves on a free port until the test ends.
func begin(t testing.TB, server *http.Server, serve func(net.Listener) error) (addr string) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = serve(l) })
	t.Cleanup(func() {
		_ = server.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

// beginUpstream serves as derper's main does.
func beginUpstream(t testing.TB, cert *tls.Certificate) (addr string) {
	s := derpserver.New(key.NewNode(), logger.Discard)
	t.Cleanup(func() { _ = s.Close() })
	mux := http.NewServeMux()
	mux.Handle("/derp", derpserver.AddWebSocketSupport(s, derpserver.Handler(s)))
	server := &http.Server{Addr: ":443", ReadTimeout: 30 * time.Second, WriteTimeout: 30 * time.Second, ErrorLog: nil}
	server.TLSConfig = &tls.Config{
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil },
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"http/1.1"},
	}
	s.ModifyTLSConfigToAddMetaCert(server.TLSConfig)
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tsweb.AddBrowserHeaders(w)
		mux.ServeHTTP(w, r)
	})
	return begin(t, server, func(l net.Listener) error { return server.ServeTLS(l, "", "") })
}

func beginRelay(t testing.TB, cert *tls.Certificate, c relay.Config) (*relay.Relay, string) {
	r := newRelay(t, c)
	server := &http.Server{Handler: r.Handler(), ReadTimeout: 30 * time.Second, WriteTimeout: 30 * time.Second}
	config := r.TLSConfig(func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil })
	return r, begin(t, server, func(l net.Listener) error {
		return server.Serve(tls.NewListener(relay.Sockets(l), config))
	})
}

// loadVariable makes TestConnectLoad the clients of BenchmarkConnect, which are
// another process so that their CPU is not the server's.
const loadVariable = "CONNECT_LOAD"

func TestConnectLoad(t *testing.T) {
	addr := os.Getenv(loadVariable)
	if addr == "" {
		t.Skip("is run by BenchmarkConnect")
	}
	n, err := strconv.Atoi(os.Getenv(loadVariable + "_N"))
	if err != nil {
		t.Fatal(err)
	}
	der, err := base64.StdEncoding.DecodeString(os.Getenv(loadVariable + "_CERT"))
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	config := trusting(&tls.Certificate{Leaf: leaf})
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for i := worker; i < n; i += 4 {
				c, err := derphttp.NewClient(key.NewNode(), "https://"+addr+"/derp", logger.Discard, netmon.NewStatic())
				if err != nil {
					t.Error(err)
					return
				}
				c.TLSConfig = config
				if err := c.Connect(t.Context()); err != nil {
					t.Error(err)
				}
				_ = c.Close()
			}
		})
	}
	wg.Wait()
}

// BenchmarkConnect measures the server's CPU for a client that comes and goes,
// upstream's way and ours in turns.
func BenchmarkConnect(b *testing.B) {
	cert := newCertificate(b)
	_, ours := beginRelay(b, cert, relay.Config{Log: zerolog.Nop()})
	upstream := beginUpstream(b, cert)
	const step = 200
	var total [2]time.Duration
	n := 0
	for b.Loop() {
		for i, addr := range []string{upstream, ours} {
			before := usedCPU(b)
			load := exec.CommandContext(b.Context(), os.Args[0], "-test.run=^TestConnectLoad$")
			load.Env = append(os.Environ(), loadVariable+"="+addr, fmt.Sprintf("%s_N=%d", loadVariable, step),
				loadVariable+"_CERT="+base64.StdEncoding.EncodeToString(cert.Certificate[0]))
			if out, err := load.CombinedOutput(); err != nil {
				b.Fatalf("%v\n%s", err, out)
			}
			total[i] += usedCPU(b) - before
		}
		n += step
	}
	b.ReportMetric(float64(total[0].Microseconds())/float64(n), "µs-upstream/connect")
	b.ReportMetric(float64(total[1].Microseconds())/float64(n), "µs-ours/connect")
	b.ReportMetric(float64(total[1])/float64(total[0]), "ratio")
	b.ReportMetric(0, "ns/op")
}

// usedCPU is what this process has used, without its children.
func usedCPU(b *testing.B) time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// connected is a client whose first packet arrived.
func connected(t *testing.T, addr string, config *tls.Config, to key.NodePrivate) {
	t.Helper()
	client := func(k key.NodePrivate) *derphttp.Client {
		c, err := derphttp.NewClient(k, "https://"+addr+"/derp", logger.Discard, netmon.NewStatic())
		if err != nil {
			t.Fatal(err)
		}
		c.TLSConfig = config
		t.Cleanup(func() { _ = c.Close() })
		if err := c.Connect(t.Context()); err != nil {
			t.Fatal(err)
		}
		return c
	}
	receiver, sender := client(to), client(key.NewNode())
	// What is sent before the server has registered the receiver is lost.
	for _, c := range []*derphttp.Client{receiver, sender} {
		if _, err := c.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	sent := bytes.Repeat([]byte{1, 2, 3}, 3000)
	if err := sender.Send(to.Public(), sent); err != nil {
		t.Fatal(err)
	}
	for {
		message, err := receiver.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if packet, ok := message.(derp.ReceivedPacket); ok {
			if !bytes.Equal(packet.Data, sent) {
				t.Error("another packet arrived")
			}
			return
		}
	}
}

func trusting(cert *tls.Certificate) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(cert.Leaf)
	return &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
}

func status(t *testing.T, c *http.Client, url string) int {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	response, err := c.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	_ = response.Body.Close()
	return response.StatusCode
}

// DERP clients and others on one listener.
func TestTLSListener(t *testing.T) {
	cert := newCertificate(t)
	_, addr := beginRelay(t, cert, relay.Config{Log: zerolog.Nop()})
	t.Run("fast start", func(t *testing.T) { connected(t, addr, trusting(cert), key.NewNode()) })
	t.Run("TLS 1.2", func(t *testing.T) {
		config := trusting(cert)
		config.MaxVersion = tls.VersionTLS12
		connected(t, addr, config, key.NewNode())
	})
	t.Run("HTTP", func(t *testing.T) {
		transport := &http.Transport{TLSClientConfig: trusting(cert)}
		defer transport.CloseIdleConnections()
		for range 3 { // over one connection
			if got := status(t, &http.Client{Transport: transport}, "https://"+addr+"/generate_204"); got != http.StatusNoContent {
				t.Error(got)
			}
		}
	})
	dial := func(t *testing.T) *tls.Conn {
		conn, err := (&tls.Dialer{Config: trusting(cert)}).DialContext(t.Context(), "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn.(*tls.Conn)
	}
	// Not with the fast start, so that there is an answer to read.
	head := "GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: DERP\r\n\r\n"
	for name, parts := range map[string][]string{
		"at once":   {head},
		"in parts":  {head[:1], head[1:30], head[30:]},
		"unusual":   {head[:len(head)-2] + "X-Unusual: 1\r\n\r\n"},
		"at length": {head[:len(head)-2] + "User-Agent: " + strings.Repeat("x", 8000) + "\r\n\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			conn := dial(t)
			for _, part := range parts {
				if _, err := io.WriteString(conn, part); err != nil {
					t.Fatal(err)
				}
			}
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			_ = response.Body.Close()
			if response.StatusCode != http.StatusSwitchingProtocols || response.Header.Get("Derp-Public-Key") == "" {
				t.Errorf("%s %v", response.Status, response.Header)
			}
		})
	}
	t.Run("HTTP without TLS", func(t *testing.T) {
		if got := status(t, http.DefaultClient, "http://"+addr); got != http.StatusBadRequest {
			t.Error(got)
		}
	})
	t.Run("nothing", func(t *testing.T) { _ = dial(t).Close() })
	// The end of the test closes the server while this one says nothing.
	dial(t)
}

// Who may connect is decided in the same way.
func TestTLSListenerAdmission(t *testing.T) {
	cert := newCertificate(t)
	asked := make(chan netip.Addr, 1)
	_, addr := beginRelay(t, cert, relay.Config{Log: zerolog.Nop(), Admit: func(_ context.Context, _ key.NodePublic, from netip.Addr) error {
		asked <- from
		return errors.New("nobody")
	}})
	c, err := derphttp.NewClient(key.NewNode(), "https://"+addr+"/derp", logger.Discard, netmon.NewStatic())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	c.TLSConfig = trusting(cert)
	if err := c.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if from := <-asked; !from.IsLoopback() {
		t.Errorf("asked about a client from %v", from)
	}
	if message, err := c.Recv(); err == nil {
		t.Errorf("a client that may not connect got %T", message)
	}
}
