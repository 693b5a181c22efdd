package node

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tailscale.com/derp/derphttp"
	"tailscale.com/types/key"

	"derpd/healthz"
	"derpd/internal/testkit"
	"derpd/relay"
)

// series are the series of derper's DERP and STUN metrics in a scrape, with their
// labels. Buckets with equal labels are one series.
func series(text string) map[string]bool {
	found := make(map[string]bool)
	for _, name := range regexp.MustCompile(`(?m)^((?:derp|stun)_[^ ]+) `).FindAllStringSubmatch(text, -1) {
		found[name[1]] = true
	}
	return found
}

// TestMetricsOfDerper asserts that the relay has every DERP and STUN metric of the
// real derper, with the same labels.
func TestMetricsOfDerper(t *testing.T) {
	path := os.Getenv("DERPD_DERPER")
	if path == "" {
		t.Skip("DERPD_DERPER is not set to upstream's derper; run make test")
	}
	dir, port := t.TempDir(), strconv.Itoa(testkit.FreePort(t))
	ctx, stop := context.WithCancel(context.Background())
	// Without TLS, since the port is not 443.
	command := exec.CommandContext(ctx, path, "-a", net.JoinHostPort("127.0.0.1", port), "-http-port", "-1", "-stun=false", "-c", dir+"/key", "-mesh-psk-file", "")
	command.Env = []string{"HOME=" + dir}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { stop(); _ = command.Wait() }()
	var theirs map[string]bool
	testkit.Wait(t, "derper to print its metrics", func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:"+port+"/debug/varz", nil)
		if err != nil {
			return err
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer func() { _ = res.Body.Close() }()
		text, err := io.ReadAll(res.Body)
		if theirs = series(string(text)); err == nil && len(theirs) == 0 {
			return fmt.Errorf("%s: no metric in\n%s", res.Status, text)
		}
		return err
	})

	// The values are reasons. No metric is missing today.
	missing := map[string]string{}
	ours := series(scrape(t, begin(t, testkit.Environ(t))))
	for _, name := range slices.Sorted(maps.Keys(theirs)) {
		if _, listed := missing[name]; ours[name] == listed {
			t.Errorf("%s: present %t, listed as missing %t", name, ours[name], listed)
		}
	}
	for _, name := range []string{`derp_packets_dropped{reason="queue_head",kind="disco"}`, `derp_bytes_dropped{reason="unknown_dest",kind="other"}`, "derp_websocket_accepts", `stun_requests{disposition="success"}`} {
		if !theirs[name] || !ours[name] {
			t.Errorf("%s: derper %t, derpd %t, want both", name, theirs[name], ours[name])
		}
	}
}

// TestPacketsWindow asserts that health judges the last ten minutes and no more,
// and that it warns above one packet in a hundred.
func TestPacketsWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var counted relay.Packets // guarded by mu
		n := &Node{packets: &packets{count: func() relay.Packets {
			mu.Lock()
			defer mu.Unlock()
			return relay.Packets{Received: counted.Received, Dropped: maps.Clone(counted.Dropped)}
		}}}
		if got := n.checkPackets(t.Context()); got != healthz.Okf("0 of 0 packets dropped in 0s") {
			t.Errorf("before the first sample: %+v", got)
		}
		counted = relay.Packets{Received: 1_000_000, Dropped: map[string]int64{"queue_head": 900_000}}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- n.packets.run(ctx) }()
		defer func() {
			stop()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}()
		synctest.Wait()
		begun := time.Now()
		for _, step := range []struct {
			at       time.Duration
			received int64 // more than before
			dropped  map[string]int64
			want     healthz.Result
		}{
			{30 * time.Second, 0, nil, healthz.Okf("0 of 0 packets dropped in 30s")},                                 // what was before the start does not count
			{40 * time.Second, 0, map[string]int64{"queue_head": 99}, healthz.Okf("99 of 0 packets dropped in 40s")}, // too few to judge
			{90 * time.Second, 9_900, nil, healthz.Okf("99 of 9900 packets dropped in 1m30s")},
			{2*time.Minute + time.Second, 100, map[string]int64{"unknown_dest": 1}, healthz.Okf("100 of 10000 packets dropped in 2m1s")},
			{3 * time.Minute, 0, map[string]int64{"queue_head": 1}, healthz.Warnf("101 of 10000 packets dropped in 3m0s, most for queue_head: %s", dropReasons["queue_head"])},
			{4 * time.Minute, 0, map[string]int64{"unknown_dest": 500}, healthz.Warnf("601 of 10000 packets dropped in 4m0s, most for unknown_dest: %s", dropReasons["unknown_dest"])},
			{13 * time.Minute, 0, nil, healthz.Warnf("501 of 0 packets dropped in 10m0s, most for unknown_dest: %s", dropReasons["unknown_dest"])},
			{14*time.Minute + time.Second, 0, nil, healthz.Okf("0 of 0 packets dropped in 9m1s")},
			{3 * time.Hour, 20_000, map[string]int64{"write_error": 200}, healthz.Okf("200 of 20000 packets dropped in 10m0s")},
		} {
			<-time.After(step.at - time.Since(begun))
			synctest.Wait()
			mu.Lock()
			counted.Received += step.received
			for reason, count := range step.dropped {
				counted.Dropped[reason] += count
			}
			mu.Unlock()
			if got := n.checkPackets(t.Context()); got != step.want {
				t.Errorf("after %s:\n%+v, want\n%+v", step.at, got, step.want)
			}
		}
		if kept := len(n.packets.samples); kept > 11 {
			t.Errorf("%d samples are kept, want the 11 of ten minutes", kept)
		}
	})
}

// TestDroppedPackets asserts that health has the reason for which most packets of
// real clients are dropped.
func TestDroppedPackets(t *testing.T) {
	n := begin(t, testkit.Environ(t))
	r := region(t, parsePolicy(t, n.printed))
	from, idle := testkit.RegionClient(t, r, key.NewNode()), testkit.RegionClient(t, r, key.NewNode())
	testkit.MustAdmit(t, from, idle)
	if report := n.health.Report(t.Context()).String(); !strings.Contains(report, "ok   packets: 0 of ") {
		t.Errorf("before: %s", report)
	}
	send := func(to *derphttp.Client, size int, until string) {
		t.Helper()
		testkit.Wait(t, until, func(ctx context.Context) error {
			for range 200 {
				if err := from.Send(to.SelfPublicKey(), make([]byte, size)); err != nil {
					t.Fatal(err)
				}
			}
			if got := n.checkPackets(ctx); got.Level != healthz.Warn || !strings.Contains(got.Detail, until) {
				return fmt.Errorf("%+v", got)
			}
			return nil
		})
	}
	send(testkit.RegionClient(t, r, key.NewNode()), 100, "most for unknown_dest: the destination is not connected")
	send(idle, 1400, "most for queue_head: the queue of the destination was full") // idle never reads
}
