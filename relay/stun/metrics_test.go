package stun

import (
	"bufio"
	"bytes"
	"context"
	"expvar"
	"io"
	"log"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"tailscale.com/net/stunserver"
	"tailscale.com/tsweb/varz"

	"derpd/internal/testkit"
)

// render is a variable as Prometheus gets it.
func render(name string, v expvar.Var) string {
	var b bytes.Buffer
	varz.WritePrometheusExpvar(&b, expvar.KeyValue{Key: name, Value: v})
	return b.String()
}

// values are the numbers of a variable by their names.
func values(t *testing.T, name string, v expvar.Var) map[string]int64 {
	t.Helper()
	all := make(map[string]int64)
	for lines := bufio.NewScanner(strings.NewReader(render(name, v))); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "#") {
			continue
		}
		key, number, _ := strings.Cut(lines.Text(), " ")
		var err error
		if all[key], err = strconv.ParseInt(number, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// withoutNumbers is what a variable prints, but the numbers.
func withoutNumbers(printed string) []string {
	lines := strings.Split(printed, "\n")
	for i, line := range lines {
		if at := strings.LastIndexByte(line, ' '); at >= 0 && !strings.HasPrefix(line, "#") {
			lines[i] = line[:at]
		}
	}
	return lines
}

// The counters print what derper's server prints, and count the same.
func TestMetricsAreDerpers(t *testing.T) {
	output := log.Writer()
	log.SetOutput(io.Discard)
	t.Cleanup(func() { log.SetOutput(output) })
	ctx, cancel := context.WithCancel(context.Background())
	theirs := stunserver.New(ctx)
	if err := theirs.Listen("[::]:0"); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- theirs.Serve() }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	counters := expvar.Get("stun")
	before := values(t, "stun", counters) // of another run in this process
	visit(t, theirs.LocalAddr().(*net.UDPAddr).AddrPort().Port())
	delta := func() map[string]int64 {
		now := values(t, "stun", counters)
		for name := range now {
			now[name] -= before[name]
		}
		return now
	}
	want := map[string]int64{
		`stun_requests{disposition="not_stun"}`: 3, `stun_requests{disposition="read_error"}`: 0,
		`stun_requests{disposition="success"}`: 5, `stun_requests{disposition="write_error"}`: 0,
		`stun_addrfamily{family="ipv4"}`: 3, `stun_addrfamily{family="ipv6"}`: 2, "stun_no_local_addr": 0,
	}
	testkit.Until(t, "derper counts the packets", func() bool { return maps.Equal(delta(), want) })

	onBothPaths(t, func(t *testing.T, singly bool) {
		s, addr := serve(t, "[::]:0", singly, Config{})
		if got, want := withoutNumbers(render("stun", s.Metrics())), withoutNumbers(render("stun", counters)); !slices.Equal(got, want) {
			t.Errorf("metrics are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		visit(t, addr.Port())
		testkit.Until(t, "derpd counts the same", func() bool { return maps.Equal(values(t, "stun", s.Metrics()), want) })
	})
}

// visit sends three requests over IPv4, two over IPv6, and three other packets.
func visit(t *testing.T, port uint16) {
	t.Helper()
	v4 := dial(t, "127.0.0.1:0", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port))
	v6 := dial(t, "[::1]:0", netip.AddrPortFrom(netip.IPv6Loopback(), port))
	v4.send([]byte("no request"))
	v4.send(notRequests()["response"])
	v6.send(notRequests()["wrong fingerprint"])
	for range 2 {
		v4.expect(v4.request())
		v6.expect(v6.request())
	}
	v4.expect(v4.request())
}
