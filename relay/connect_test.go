package relay_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
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
	return r, begin(t, server, func(l net.Listener) error { return server.Serve(r.TLSListener(relay.ReadAhead(l), config)) })
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
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for i := worker; i < n; i += 4 {
				c, err := derphttp.NewClient(key.NewNode(), "https://"+addr+"/derp", logger.Discard, netmon.NewStatic())
				if err != nil {
					t.Error(err)
					return
				}
				c.TLSConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
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
