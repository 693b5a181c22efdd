package node

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/tailscale/hujson"
	"go.uber.org/goleak"
	"tailscale.com/derp/derphttp"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/cmd/derpd/internal/config"
	"derpd/internal/testkit"
)

// publicRoot is the authority that every machine knows: the only system root of this
// process.
var publicRoot *tls.Certificate

// TestMain runs the tests, and fails if a goroutine is left after them. Under
// the name derpd it runs a relay instead; see [testkit.LinkAsDerpd].
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "derpd" {
		os.Exit(runRelay())
	}
	root, remove, err := testkit.PublicAuthority()
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	publicRoot = root
	goleak.VerifyTestMain(m,
		goleak.Cleanup(func(code int) { remove(); os.Exit(code) }),
		// pebble cannot stop its workers.
		goleak.IgnoreAnyFunction("github.com/letsencrypt/pebble/v2/va.VAImpl.processTasks"),
		// certmagic's rate limiters run until the process ends.
		goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.(*RingBufferRateLimiter).loop"),
		// http.Transport keeps idle connections to admission URLs.
		goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"),
		goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"),
	)
}

// runRelay runs a relay with the environment of the process.
func runRelay() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	c, err := config.Load(os.Environ())
	if err == nil {
		var n *Node
		if n, err = New(ctx, c, Options{Start: time.Now(), Map: io.Discard, Log: zerolog.New(os.Stderr)}); err == nil {
			err = n.Run(ctx)
		}
	}
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// testNode is a complete relay in the test's process, on loopback and free
// ports.
type testNode struct {
	*Node
	printed []byte // output of the start: the map
	stop    func() // stops the relay; the test fails after testkit.Patience
}

// begin starts a relay and waits until it is ready. The functions in bound run
// after the sockets are bound and before any task runs.
func begin(t *testing.T, env []string, bound ...func(*Node)) *testNode {
	t.Helper()
	c, err := config.Load(testkit.LastOfEach(env))
	if err != nil {
		t.Fatal(err)
	}
	return beginConfig(t, c, nil, bound...)
}

// beginConfig is begin with a configuration that no environment can give, and in
// a container with these gateways.
func beginConfig(t *testing.T, c *config.Config, gateways []netip.Addr, bound ...func(*Node)) *testNode {
	t.Helper()
	printed := make(chanWriter, 1)
	ctx, cancel := context.WithCancel(context.Background())
	n, err := New(ctx, c, Options{
		Gateways: gateways, Start: time.Now(), Map: printed,
		Log: zerolog.New(zerolog.NewTestWriter(t)).Level(zerolog.InfoLevel),
	})
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	for _, f := range bound {
		f(n)
	}
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := testkit.Receive(t, "the end of the relay", done); err != nil {
			t.Errorf("the relay ended with %v", err)
		}
	})
	t.Cleanup(stop)
	select {
	case text := <-printed:
		return &testNode{n, text, stop}
	case <-time.After(testkit.Patience):
		t.Fatalf("the relay is not ready: %s", n.health.Report(context.Background()))
		return nil
	}
}

// chanWriter sends a copy of each write.
type chanWriter chan []byte

func (w chanWriter) Write(p []byte) (int, error) {
	w <- bytes.Clone(p)
	return len(p), nil
}

type setup = testkit.Setup

var file, pair = testkit.File, testkit.Pair

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
