package node

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"tailscale.com/net/stun"

	"derpd/cmd/derpd/internal/config"
	"derpd/healthz"
	"derpd/internal/testkit"
)

// A request from the gateway has no answer, and the operator learns why; the
// relay's own requests come from loopback and go on.
func TestSTUNFromTheGateway(t *testing.T) {
	c, err := config.Load(testkit.LastOfEach(testkit.Environ(t, "DERP_STUN_ADDR=127.0.0.1")))
	if err != nil {
		t.Fatal(err)
	}
	n := beginConfig(t, c, []netip.Addr{netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("fe80::1")})
	if got := stunCheck(t, n); got.Level != healthz.OK {
		t.Errorf("before any request: %+v", got)
	}

	ask := func(from string) *net.UDPConn {
		conn, err := net.DialUDP("udp", &net.UDPAddr{IP: net.ParseIP(from)}, n.listeners.stun.LocalAddr().(*net.UDPAddr))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		if _, err := conn.Write(stun.Request(stun.NewTxID())); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	answered := func(conn *net.UDPConn, within time.Duration) bool {
		if err := conn.SetReadDeadline(time.Now().Add(within)); err != nil {
			t.Fatal(err)
		}
		_, err := conn.Read(make([]byte, 1500))
		return err == nil
	}
	gateway := ask("127.0.0.2")
	// The response to a later request shows that the server has read the
	// first one.
	if !answered(ask("127.0.0.3"), testkit.Patience) {
		t.Error("a client has no answer")
	}
	if answered(gateway, 50*time.Millisecond) {
		t.Error("the gateway has an answer")
	}

	got := stunCheck(t, n)
	for _, want := range []string{"round trip in", "1 requests refused", "DERP_PUBLIC_IPV6=none"} {
		if got.Level != healthz.Warn || !strings.Contains(got.Detail, want) {
			t.Errorf("health says %+v, want a warning with %q", got, want)
		}
	}
	if report := n.health.Report(t.Context()); !report.Ready {
		t.Error(report)
	}
	text := scrape(t, n)
	for _, want := range []string{"\nderpd_stun_gateway_refused_total 1\n", "\nstun_no_local_addr 0\n", "\nstun_requests{disposition=\"success\"} "} {
		if !strings.Contains(text, want) {
			t.Errorf("metrics lack %q:\n%s", want, text)
		}
	}
}

// stunCheck returns the current result of health's check of STUN.
func stunCheck(t *testing.T, n *testNode) healthz.Result {
	t.Helper()
	n.health.Changed()
	checks := n.health.Report(t.Context()).Checks
	i := slices.IndexFunc(checks, func(c healthz.Result) bool { return c.Name == "stun" })
	if i < 0 {
		t.Fatalf("no check of STUN in %v", checks)
	}
	return checks[i]
}
