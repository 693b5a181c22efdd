package main

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tailscale.com/net/stun"

	"derpd/healthz"
)

func TestContainerGateways(t *testing.T) {
	native := func(addr string) string {
		b := netip.MustParseAddr(addr).As4()
		return fmt.Sprintf("%08X", binary.NativeEndian.Uint32(b[:]))
	}
	// As a container on a network with both families has them.
	route4 := "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n" +
		"eth0\t00000000\t" + native("172.17.0.1") + "\t0003\t0\t0\t0\t00000000\t0\t0\t0\n" +
		"eth0\t" + native("172.17.0.0") + "\t00000000\t0001\t0\t0\t0\t" + native("255.255.0.0") + "\t0\t0\t0\n" +
		"eth0\t" + native("10.0.0.0") + "\t" + native("172.17.0.9") + "\t0003\t0\t0\t0\t" + native("255.0.0.0") + "\t0\t0\t0\n"
	route6 := "fd000000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n" +
		"00000000000000000000000000000000 00 00000000000000000000000000000000 00 fd000000000000000000000000000001 00000400 00000002 00000000 00000003     eth0\n" +
		"00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo\n"
	docker := map[string]string{".dockerenv": "", "proc/net/route": route4, "proc/net/ipv6_route": route6}
	with := func(files map[string]string, name, content string) map[string]string {
		out := map[string]string{name: content}
		for k, v := range files {
			if _, replaced := out[k]; !replaced {
				out[k] = v
			}
		}
		return out
	}
	machine := map[string]string{"proc/net/route": route4, "proc/net/ipv6_route": route6, "etc/hosts": "127.0.0.1\tlocalhost\n"}
	for name, tt := range map[string]struct {
		files  map[string]string
		driver string
		want   string
	}{
		"Docker":                          {docker, "veth", "172.17.0.1 fd00::1"},
		"Podman":                          {with(machine, "run/.containerenv", ""), "veth", "172.17.0.1 fd00::1"},
		"Podman without root":             {with(machine, "run/.containerenv", ""), "tun", "172.17.0.1 fd00::1"},
		"Kubernetes":                      {with(machine, "etc/hosts", "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"), "veth", "172.17.0.1 fd00::1"},
		"without IPv6":                    {with(docker, "proc/net/ipv6_route", ""), "veth", "172.17.0.1"},
		"the host's network":              {docker, "virtio_net", ""},
		"the host's network in a pod":     {with(machine, "etc/hosts", "# Kubernetes-managed hosts file (host network).\n"), "ena", ""},
		"macvlan":                         {docker, "macvlan", ""},
		"a network without a way out":     {with(docker, "proc/net/route", "Iface\n"), "veth", "fd00::1"},
		"a machine":                       {machine, "igb", ""},
		"a machine in LXC":                {machine, "veth", ""},
		"a machine with a VPN as way out": {machine, "tun", ""},
		"no driver to be had":             {docker, "", ""},
		"nonsense":                        {with(docker, "proc/net/route", "eth0\t00000000\tZZ\t0003\t0\t0\t0\t00000000\n\n"), "veth", "fd00::1"},
	} {
		root := t.TempDir()
		for file, content := range tt.files {
			path := filepath.Join(root, file)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		var got []string
		for _, addr := range containerGateways(root, func(string) string { return tt.driver }) {
			got = append(got, addr.String())
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}

// A request from the gateway has no answer, and the operator learns why; the
// relay's own requests come from loopback and go on.
func TestSTUNFromTheGateway(t *testing.T) {
	c, err := loadConfig(dedup(loopbackEnv(t, "DERP_STUN_ADDR=127.0.0.1")))
	if err != nil {
		t.Fatal(err)
	}
	c.gateways = []netip.Addr{netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("fe80::1")}
	n := beginConfig(t, c)
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
	// What comes later has its answer, so the first request was seen.
	if !answered(ask("127.0.0.3"), patience) {
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
	w := httptest.NewRecorder()
	n.serveMetrics(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", http.NoBody))
	if want := "\nderpd_stun_gateway_refused_total 1\n"; !strings.Contains(w.Body.String(), want) {
		t.Errorf("metrics lack %q:\n%s", want, w.Body)
	}
}

// stunCheck is what health says of STUN now.
func stunCheck(t *testing.T, n *testNode) healthz.Named {
	t.Helper()
	n.health.Changed()
	checks := n.health.Report(t.Context()).Checks
	i := slices.IndexFunc(checks, func(c healthz.Named) bool { return c.Name == "stun" })
	if i < 0 {
		t.Fatalf("no check of STUN in %v", checks)
	}
	return checks[i]
}
