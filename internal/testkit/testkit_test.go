package testkit

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"tailscale.com/derp"
	"tailscale.com/derp/derpserver"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// failing is a test whose failure the real test expects.
type failing struct {
	testing.TB
	message string
}

func (f *failing) Fatalf(format string, args ...any) {
	f.message = fmt.Sprintf(format, args...)
	runtime.Goexit()
}
func (f *failing) Fatal(args ...any) { f.Fatalf("%s", fmt.Sprint(args...)) }
func (*failing) Helper()             {}

// failureOf runs a function that must fail its test, and returns the message.
func failureOf(t *testing.T, run func(testing.TB)) string {
	t.Helper()
	f := &failing{TB: t}
	ended := make(chan bool)
	go func() {
		defer close(ended)
		run(f)
		ended <- true
	}()
	if <-ended {
		t.Error("the function did not fail its test")
	}
	return f.message
}

// TestWait asserts how long the functions wait, and their messages.
func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for what, c := range map[string]struct {
			run  func(testing.TB)
			want string
			took time.Duration
		}{
			"Wait": {func(t testing.TB) {
				Wait(t, "a packet", func(context.Context) error { return errors.New("silence") })
			}, "waited 1m0s for a packet: silence", Patience},
			"Within": {func(t testing.TB) {
				Within(t, time.Second, "a packet", func(context.Context) error { return errors.New("silence") })
			}, "waited 1s for a packet: silence", time.Second},
			"Until":   {func(t testing.TB) { Until(t, "it is ready", func() bool { return false }) }, "not within 1m0s: it is ready", Patience},
			"Receive": {func(t testing.TB) { Receive(t, "the end", make(chan int)) }, "not within 1m0s: the end", Patience},
		} {
			begun := time.Now()
			if got := failureOf(t, c.run); got != c.want || time.Since(begun) != c.took {
				t.Errorf("%s: %q after %v, want %q after %v", what, got, time.Since(begun), c.want, c.took)
			}
		}
		attempts, begun := 0, time.Now()
		Until(t, "three attempts", func() bool { attempts++; return attempts == 3 })
		if took := time.Since(begun); attempts != 3 || took != 2*pollEvery {
			t.Errorf("%d attempts in %v, want 3 in %v", attempts, took, 2*pollEvery)
		}
		values := make(chan int, 1)
		values <- 7
		if got := Receive(t, "a value", values); got != 7 {
			t.Errorf("received %d, want 7", got)
		}
	})
}

// TestFreePort binds the port as a program does, twice, and asks for more ports
// meanwhile.
func TestFreePort(t *testing.T) {
	port := FreePort(t)
	for range 2 {
		for _, host := range []string{"127.0.0.1", ""} {
			addr := fmt.Sprintf("%s:%d", host, port)
			ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			udp, err := new(net.ListenConfig).ListenPacket(t.Context(), "udp", addr)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = ln.Close(), udp.Close()
		}
	}
	if release, err := reserve(port); err == nil {
		release()
		t.Error("a port is reserved twice")
	}
	seen := []int{port}
	for range 50 {
		p := FreePort(t)
		if slices.Contains(seen, p) || p < firstPort || p > lastPort {
			t.Errorf("got port %d after %v", p, seen)
		}
		seen = append(seen, p)
	}
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	if release, err := reserve(ln.Addr().(*net.TCPAddr).Port); err == nil {
		release()
		t.Error("the port of a running server is reserved")
	}
}

// TestCertificates verifies chains as a client does.
func TestCertificates(t *testing.T) {
	root := NewAuthority(t)
	middle := NewCertificate(t, Certificate{Names: []string{"Test Intermediate"}, CA: true, Issuer: root})
	leaf := NewCertificate(t, Certificate{Names: []string{"derp.example.com", "127.0.0.1"}, Issuer: middle})
	alone := SelfSigned(t, "derp.example.com")
	if err := errors.Join(leaf.Leaf.CheckSignatureFrom(middle.Leaf), middle.Leaf.CheckSignatureFrom(root.Leaf)); err != nil {
		t.Error(err)
	}
	if err := errors.Join(leaf.Leaf.VerifyHostname("127.0.0.1"), alone.Leaf.VerifyHostname("derp.example.com")); err != nil {
		t.Error(err)
	}
	dir := t.TempDir()
	WritePair(t, dir+"/tls.crt", dir+"/tls.key", leaf, middle)
	if pair, err := tls.LoadX509KeyPair(dir+"/tls.crt", dir+"/tls.key"); err != nil || len(pair.Certificate) != 2 || !pair.Leaf.Equal(leaf.Leaf) {
		t.Errorf("the files hold %d certificates, %v", len(pair.Certificate), err)
	}
	if err := leaf.Leaf.VerifyHostname("example.com"); err == nil {
		t.Error("a certificate covers another name")
	}
}

// startRelay starts upstream's relay, and returns it with the region of its map.
func startRelay(t *testing.T) (*derpserver.Server, *tailcfg.DERPRegion) {
	t.Helper()
	s := derpserver.New(key.NewNode(), logger.Discard)
	server := httptest.NewTLSServer(derpserver.Handler(s))
	t.Cleanup(func() {
		_ = s.Close()
		server.Close()
	})
	return s, &tailcfg.DERPRegion{RegionID: 900, Nodes: []*tailcfg.DERPNode{{
		Name: "900a", RegionID: 900, HostName: "127.0.0.1", IPv4: "127.0.0.1", IPv6: "none",
		CertName: "sha256-raw:" + Hash(server.Certificate()), DERPPort: server.Listener.Addr().(*net.TCPAddr).Port, STUNPort: -1,
	}}}
}

// TestExchange passes packets through upstream's relay, also between clients
// that are not connected yet.
func TestExchange(t *testing.T) {
	s, region := startRelay(t)
	a, b := RegionClient(t, region, key.NewNode()), RegionClient(t, region, key.NewNode())
	Exchange(t, a, b)
	Exchange(t, a, b)
	if took := Reach(t, b, a); took <= 0 {
		t.Errorf("reached in %v", took)
	}
	c := RegionClient(t, region, key.NewNode())
	MustAdmit(t, c)
	if err := c.Send(b.SelfPublicKey(), []byte("forged")); err != nil {
		t.Fatal(err)
	}
	Reach(t, c, a) // the relay has handled the packet before this one
	if got := failureOf(t, func(t testing.TB) { Exchange(t, a, b) }); got != "another packet arrives than was sent" {
		t.Errorf("with a packet of another client: %q", got)
	}
	_ = s.Close()
	if got := failureOf(t, func(t testing.TB) { Exchange(t, a, b) }); got == "" {
		t.Error("packets pass a relay that is closed")
	}
}

// TestAdmitted asserts that a refusal is seen, although Connect succeeds.
func TestAdmitted(t *testing.T) {
	s, region := startRelay(t)
	refuses := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(refuses.Close)
	s.SetVerifyClientURL(refuses.URL)
	s.SetVerifyClientURLFailOpen(false)
	c := RegionClient(t, region, key.NewNode())
	if err := Admitted(t, c); err == nil {
		t.Error("a client that the relay refuses is admitted")
	}
	if got := failureOf(t, func(t testing.TB) { MustAdmit(t, c) }); got == "" {
		t.Error("no message")
	}
}

// silent is a client that receives nothing.
type silent struct{ key.NodePublic }

func (silent) Send(key.NodePublic, []byte) error   { return nil }
func (s silent) SelfPublicKey() key.NodePublic     { return s.NodePublic }
func (silent) Recv() (derp.ReceivedMessage, error) { return nil, errors.New("disconnected") }

// TestReachGivesUp asserts that Reach ends although every error is one of a
// connection.
func TestReachGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := silent{key.NewNode().Public()}
		if got := failureOf(t, func(t testing.TB) { Reach(t, c, c) }); got == "" {
			t.Error("no message")
		}
	})
}

// TestCPUTime asserts that work of the process is counted.
func TestCPUTime(t *testing.T) {
	before := CPUTime(t)
	Until(t, "CPU time grows", func() bool {
		for range 1_000_000 {
			_ = time.Now()
		}
		return CPUTime(t) > before
	})
}
