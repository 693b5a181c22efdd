package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/rs/zerolog"
	"github.com/tailscale/hujson"
	"go.uber.org/goleak"
	"tailscale.com/derp/derphttp"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

const patience = testkit.Patience

func TestMain(m *testing.M) {
	testscript.Main(leakChecked{m}, map[string]func(){"derpd": main})
}

// leakChecked fails the run if a goroutine is left after all tests.
type leakChecked struct{ *testing.M }

func (m leakChecked) Run() int {
	code := m.M.Run()
	if err := goleak.Find(
		// pebble cannot stop its workers.
		goleak.IgnoreAnyFunction("github.com/letsencrypt/pebble/v2/va.VAImpl.processTasks"),
		// certmagic's rate limiters run until the process ends.
		goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.(*RingBufferRateLimiter).loop"),
		// http.Transport keeps idle connections to admission URLs.
		goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"),
		goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"),
	); err != nil && code == 0 {
		_, _ = os.Stderr.WriteString(err.Error() + "\n")
		return 1
	}
	return code
}

// testNode is a complete relay in the test's process, on loopback and free
// ports.
type testNode struct {
	*node
	printed []byte // output of the start: the map
	stop    func() // stops the relay; the test fails after patience
}

// loopbackEnv is the environment of a relay on loopback, and the given pairs.
func loopbackEnv(t *testing.T, pairs ...string) []string {
	t.Helper()
	return append([]string{
		"DERP_ADDR=127.0.0.1:0", "DERP_HTTP_PORT=0", "DERP_STUN_PORT=0", "DERP_ADMIN_ADDR=127.0.0.1:0",
		"DERP_DATA_DIR=" + t.TempDir(), "DERP_DISCOVERY=off", "DERP_TAILSCALED_SOCKET=/nonexistent/tailscaled.sock",
		"DERP_PUBLIC_IPV4=127.0.0.1", "DERP_PUBLIC_IPV6=none",
	}, pairs...)
}

// begin starts a relay and waits until it is ready. The functions in bound run
// after the sockets are bound and before any task runs.
func begin(t *testing.T, env []string, bound ...func(*node)) *testNode {
	t.Helper()
	c, err := loadConfig(dedup(env))
	if err != nil {
		t.Fatal(err)
	}
	return beginConfig(t, c, bound...)
}

// beginConfig is begin for settings without a variable.
func beginConfig(t *testing.T, c *config, bound ...func(*node)) *testNode {
	t.Helper()
	printed := make(chanWriter, 1)
	ctx, cancel := context.WithCancel(context.Background())
	n, err := newNode(ctx, time.Now(), c, zerolog.New(zerolog.NewTestWriter(t)).Level(zerolog.InfoLevel), printed)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	for _, f := range bound {
		f(n)
	}
	done := make(chan error, 1)
	go func() { done <- runTasks(ctx, n.tasks(), n.log) }()
	stop := sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("the relay ended with %v", err)
			}
		case <-time.After(patience):
			t.Error("the relay does not stop")
		}
	})
	t.Cleanup(stop)
	select {
	case text := <-printed:
		return &testNode{n, text, stop}
	case <-time.After(patience):
		t.Fatalf("the relay is not ready: %s", n.health.Report(context.Background()))
		return nil
	}
}

// dedup keeps the last value of each variable, as a shell does.
func dedup(env []string) []string {
	last := make(map[string]string)
	for _, pair := range env {
		name, _, _ := strings.Cut(pair, "=")
		last[name] = pair
	}
	out := make([]string, 0, len(last))
	for _, pair := range last {
		out = append(out, pair)
	}
	return out
}

// chanWriter sends a copy of each write.
type chanWriter chan []byte

func (w chanWriter) Write(p []byte) (int, error) {
	w <- bytes.Clone(p)
	return len(p), nil
}

// parsePolicy reads a map in the policy format as Tailscale does: HuJSON to
// JSON, then tailcfg.DERPMap.
func parsePolicy(t *testing.T, text []byte) *tailcfg.DERPMap {
	t.Helper()
	standard, err := hujson.Standardize(bytes.Clone(text))
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	var policy struct {
		DERPMap *tailcfg.DERPMap `json:"derpMap"`
	}
	dec := json.NewDecoder(bytes.NewReader(standard))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&policy); err != nil || policy.DERPMap == nil {
		t.Fatalf("%v in\n%s", err, standard)
	}
	return policy.DERPMap
}

// region returns the only region of a map, which has one node.
func region(t *testing.T, m *tailcfg.DERPMap) *tailcfg.DERPRegion {
	t.Helper()
	for _, r := range m.Regions {
		if len(m.Regions) == 1 && len(r.Nodes) == 1 {
			return r
		}
	}
	t.Fatalf("want one region with one node, got %+v", m)
	return nil
}

// exchangeOver connects two clients that know the relay by the region alone,
// and exchanges packets.
func exchangeOver(t *testing.T, r *tailcfg.DERPRegion, prepare func(*derphttp.Client)) (a, b *derphttp.Client) {
	t.Helper()
	a, b = testkit.RegionClient(t, r, key.NewNode()), testkit.RegionClient(t, r, key.NewNode())
	for _, c := range []*derphttp.Client{a, b} {
		if prepare != nil {
			prepare(c)
		}
		testkit.MustAdmit(t, c)
	}
	testkit.Exchange(t, a, b)
	return a, b
}

// stunAddr is the address of STUN in the map.
func stunAddr(t *testing.T, n *tailcfg.DERPNode) netip.AddrPort {
	t.Helper()
	stunPort := n.STUNPort
	if stunPort == 0 {
		stunPort = 3478
	}
	return netip.MustParseAddrPort(net.JoinHostPort(n.IPv4, strconv.Itoa(stunPort)))
}

// tree lists every file below a directory with its content.
func tree(t *testing.T, dir string) []string {
	t.Helper()
	var list []string
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		entry := path
		if d.Type().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			entry += "\n" + string(data)
		}
		list = append(list, entry)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(list)
	return list
}
