package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/certs"
	"derpd/cmd/derpd/internal/admin"
	"derpd/cmd/derpd/internal/config"
	"derpd/internal/testkit"
	"derpd/internal/testkit/acmetest"
	"derpd/relay"
	"derpd/relay/derpmap"
)

const (
	meshSecret  = "the secret of the nodes in a test"
	otherSecret = "another secret that comes next"
)

// meshNode is the configuration of a node that has not started.
type meshNode struct {
	port, pin string
	env       []string
}

// entry is the node's entry in DERP_MESH_WITH.
func (n meshNode) entry() string { return "127.0.0.1:" + n.port + "=" + n.pin }

// meshNodes returns nodes with ports and pinned certificates of their own.
// DERP_MESH_WITH is the same for all, so that it includes the node itself.
func meshNodes(t *testing.T, count int, pairs ...string) []meshNode {
	t.Helper()
	list := make([]meshNode, count)
	var entries []string
	for i := range list {
		dir := t.TempDir()
		m, err := certs.LoadOrCreatePinned(certs.PinnedConfig{Path: filepath.Join(dir, "certs", "pinned.pem"), Names: []string{"127.0.0.1"}})
		if err != nil {
			t.Fatal(err)
		}
		list[i] = meshNode{
			port: strconv.Itoa(testkit.FreePort(t)),
			pin:  m.Status().Pin,
			env:  append(testkit.Environ(t), "DERP_DATA_DIR="+dir, "DERP_MESH_KEY="+meshSecret),
		}
		entries = append(entries, list[i].entry())
	}
	for i := range list {
		list[i].env = append(list[i].env, "DERP_ADDR=127.0.0.1:"+list[i].port, "DERP_MESH_WITH="+strings.Join(entries, ","))
		list[i].env = append(list[i].env, pairs...)
	}
	return list
}

// beginAll starts the nodes one after the other.
func beginAll(t *testing.T, list []meshNode) []*testNode {
	t.Helper()
	running := make([]*testNode, len(list))
	for i, n := range list {
		running[i] = begin(t, n.env)
	}
	return running
}

// awaitMesh waits until each node is connected to every other.
func awaitMesh(t *testing.T, nodes ...*testNode) {
	t.Helper()
	for _, n := range nodes {
		testkit.Until(t, n.listeners.https.Addr().String()+" is connected to the others", func() bool {
			return !slices.ContainsFunc(n.relay.Mesh().States(), func(s relay.MeshState) bool { return !s.Up && !s.Self })
		})
	}
}

// alone is the region without the other nodes, so that a client stays on this
// one.
func alone(t *testing.T, n *testNode) *tailcfg.DERPRegion {
	t.Helper()
	own, _, err := n.public(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return derpmap.New(own).Regions[900]
}

// clientOf connects a client to one node.
func clientOf(t *testing.T, n *testNode, private key.NodePrivate) *derphttp.Client {
	t.Helper()
	c := testkit.RegionClient(t, alone(t, n), private)
	testkit.MustAdmit(t, c)
	return c
}

// reachBothWays passes a packet each way between clients of different nodes. Their
// connections may end meanwhile, when a node is restarted.
func reachBothWays(t *testing.T, a, b *derphttp.Client) {
	t.Helper()
	testkit.Reach(t, a, b)
	testkit.Reach(t, b, a)
}

// meshHealth is the line about the mesh in the health report.
func meshHealth(n *testNode) string {
	r := n.checkMesh(context.Background())
	return r.Level.String() + " " + r.Detail
}

// TestMesh exchanges packets between clients of different nodes, also after a
// node was stopped. Every node prints the same map of all nodes.
func TestMesh(t *testing.T) {
	list := meshNodes(t, 3)
	nodes := beginAll(t, list)
	awaitMesh(t, nodes...)
	clients := make([]*derphttp.Client, len(nodes))
	for i, n := range nodes {
		clients[i] = clientOf(t, n, key.NewNode())
	}
	for i := range clients {
		reachBothWays(t, clients[i], clients[(i+1)%len(clients)])
	}
	for _, n := range nodes {
		if got := meshHealth(n); got != "ok 2 of 2 nodes connected" {
			t.Error(got)
		}
		if got := scrape(t, n); strings.Count(got, "\nderpd_mesh_up{node=\"127.0.0.1:") != 2 || strings.Count(got, "\nderpd_mesh_clients{") != 2 {
			t.Error("metrics lack a node that is up:\n" + got)
		}
	}

	for range 2 {
		clientOf(t, nodes[1], key.NewNode())
	}
	testkit.Until(t, "the metrics count three clients of another node", func() bool {
		return strings.Contains(scrape(t, nodes[0]), "\nderpd_mesh_clients{node=\"127.0.0.1:"+list[1].port+"\"} 3\n")
	})

	// Every node prints the same map.
	var names []string
	first := currentMap(t, nodes[0])
	for _, n := range first.Regions[900].Nodes {
		i := slices.IndexFunc(list, func(l meshNode) bool { return l.port == strconv.Itoa(n.DERPPort) })
		if i == -1 || n.CertName != list[i].pin || n.STUNPort != port(nodes[i].listeners.stun.LocalAddr()) {
			t.Errorf("%+v is none of the nodes", n)
		}
		names = append(names, n.Name)
	}
	if got := strings.Join(names, " "); got != "900a 900b 900c" {
		t.Errorf("the map has %s", got)
	}
	for _, n := range nodes[1:] {
		for i, got := range currentMap(t, n).Regions[900].Nodes {
			if *got != *first.Regions[900].Nodes[i] {
				t.Errorf("another node prints %+v", got)
			}
		}
	}

	// The other nodes keep working after one has stopped.
	nodes[2].stop()
	down := "127.0.0.1:" + list[2].port
	for _, n := range nodes[:2] {
		testkit.Until(t, "health misses the node", func() bool {
			got := meshHealth(n)
			return strings.HasPrefix(got, "warn 1 of 2 nodes connected; "+down+" is down for ") && strings.HasSuffix(got, "s: connect: connection refused")
		})
		if report := n.health.Report(t.Context()); !report.Ready {
			t.Errorf("a node is not ready while another one is down: %s", report)
		}
		if got := scrape(t, n); !strings.Contains(got, "\nderpd_mesh_up{node=\""+down+"\"} 0\n") {
			t.Error("metrics do not miss the node:\n" + got)
		}
		if got := len(currentMap(t, n).Regions[900].Nodes); got != 3 {
			t.Errorf("the map forgot a node that is down: %d nodes", got)
		}
	}
	reachBothWays(t, clients[0], clients[1])

	nodes[2] = begin(t, list[2].env)
	back := time.Now()
	awaitMesh(t, nodes...)
	t.Logf("every mesh connection is back %s after the node is", time.Since(back).Round(time.Millisecond))
	testkit.Reach(t, clients[0], clients[2])
	t.Logf("packets arrive %s after the node is back", time.Since(back).Round(time.Millisecond))
	reachBothWays(t, clients[2], clients[1])
}

// scrape returns the metrics of a node.
func scrape(t *testing.T, n *testNode) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	return do(t, client, http.MethodGet, "http://"+n.listeners.admin.Addr().String()+"/metrics", nil).body
}

// currentMap returns the map that `derpd derpmap` prints now.
func currentMap(t *testing.T, n *testNode) *tailcfg.DERPMap {
	t.Helper()
	text, err := admin.Client{Addr: n.listeners.admin.Addr().String()}.Map(t.Context(), "policy")
	if err != nil {
		t.Fatal(err)
	}
	return parsePolicy(t, text)
}

// TestMapWithoutANode asserts that the map names the nodes that could not be
// asked, or are in another region.
func TestMapWithoutANode(t *testing.T) {
	list := meshNodes(t, 2)
	first := begin(t, list[0].env)
	want := "// 127.0.0.1:" + list[1].port + " belongs here too, but could not be asked: connect: connection refused."
	if got := region(t, parsePolicy(t, first.printed)); len(got.Nodes) != 1 || !strings.Contains(string(first.printed), want) {
		t.Errorf("%d nodes, want one, and %q in\n%s", len(got.Nodes), want, first.printed)
	}
	second := begin(t, append(list[1].env, "DERP_REGION_ID=901"))
	if want := "// 127.0.0.1:" + list[0].port + " says that it is in region 900: give"; !strings.Contains(string(second.printed), want) {
		t.Errorf("want %q in\n%s", want, second.printed)
	}
	region(t, parsePolicy(t, second.printed))
}

// The mesh key is changed by setting the new one on every node and restarting
// them. A node that still has the old key is refused, and both say so.
func TestMeshKeyChange(t *testing.T) {
	list := meshNodes(t, 2)
	nodes := beginAll(t, list)
	for i := range nodes {
		nodes[i].stop()
		nodes[i] = begin(t, append(list[i].env, "DERP_MESH_KEY="+otherSecret))
	}
	awaitMesh(t, nodes...)
	reachBothWays(t, clientOf(t, nodes[0], key.NewNode()), clientOf(t, nodes[1], key.NewNode()))

	nodes[0].stop()
	nodes[0] = begin(t, list[0].env)
	for i, n := range nodes {
		testkit.Until(t, "health reports the other key", func() bool {
			got := meshHealth(n)
			return strings.HasPrefix(got, "warn 0 of 1 nodes connected; 127.0.0.1:"+list[1-i].port+" is down for ") &&
				strings.HasSuffix(got, "s: the node closed the connection after the mesh key: it has another key, or is stopping")
		})
		if got := n.health.Report(t.Context()); !got.Ready || !strings.Contains(got.String(), "warn mesh: 0 of 1 nodes connected; ") {
			t.Error(got)
		}
	}
}

// TestMeshOfClosedRelays asserts that each node of a mesh admits its own
// clients only, and that a node with another mesh key is refused.
func TestMeshOfClosedRelays(t *testing.T) {
	members := []key.NodePrivate{key.NewNode(), key.NewNode()}
	list := meshNodes(t, 2)
	for i := range list {
		list[i].env = append(list[i].env, "DERP_ALLOW_KEYS="+members[i].Public().String())
	}
	nodes := beginAll(t, list)
	awaitMesh(t, nodes...)
	reachBothWays(t, clientOf(t, nodes[0], members[0]), clientOf(t, nodes[1], members[1]))
	for i, n := range nodes {
		if err := connectAs(t, alone(t, n), members[1-i]); err == nil {
			t.Error("a client is admitted where only the other node knows it")
		}
		if list := n.connected(); len(list) != 1 {
			t.Errorf("connected here are %v, want the one client", list)
		}
	}

	// A node with another mesh key is refused like any stranger.
	nodes[1].stop()
	nodes[1] = begin(t, append(list[1].env, "DERP_MESH_KEY="+otherSecret))
	testkit.Until(t, "health tells about the key", func() bool {
		return strings.Contains(meshHealth(nodes[0]), ": the node closed the connection after the mesh key: it has another key")
	})
}

// TestStrangersAreNoMeshPeers sends what only mesh nodes may send, without the
// mesh key. The relay hangs up.
func TestStrangersAreNoMeshPeers(t *testing.T) {
	list := meshNodes(t, 1)
	n := begin(t, list[0].env)
	victim := clientOf(t, n, key.NewNode())
	roots := x509.NewCertPool()
	roots.AddCert(n.certs.Status().Leaf)
	dial := func(meshKey string, watch bool) *derphttp.Client {
		c := testkit.URLClient(t, "https://"+n.listeners.https.Addr().String()+"/derp", key.NewNode())
		c.TLSConfig = testkit.Trust(roots)
		c.WatchConnectionChanges = watch
		if meshKey != "" {
			var err error
			if c.MeshKey, err = relay.ParseMeshKey(meshKey); err != nil {
				t.Fatal(err)
			}
		}
		testkit.MustAdmit(t, c)
		return c
	}
	// Upstream's client connects as another derper does.
	if message, err := dial(meshSecret, true).Recv(); err != nil {
		t.Errorf("the key is not accepted: %v", err)
	} else if _, ok := message.(derp.PeerPresentMessage); !ok {
		t.Errorf("got %T, want the list of clients", message)
	}
	for _, guess := range []string{"", meshSecret + " ", strings.Repeat("01234567", 8)} {
		if message, err := dial(guess, true).Recv(); err == nil {
			t.Errorf("a stranger who watches gets %T", message)
		}
		c := dial(guess, false)
		if err := c.ForwardPacket(key.NewNode().Public(), victim.SelfPublicKey(), derp.LoanBytes([]byte("forged"))); err != nil {
			t.Fatal(err)
		}
		if message, err := c.Recv(); err == nil {
			t.Errorf("a stranger who forwards gets %T", message)
		}
	}
	// Exchange fails if a forged packet has reached the victim.
	testkit.Exchange(t, clientOf(t, n, key.NewNode()), victim)

	// The endpoint of the mesh looks like any unknown path.
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: testkit.Trust(roots), DisableKeepAlives: true}}
	base := "https://" + n.listeners.https.Addr().String()
	unknown := do(t, client, http.MethodGet, base+"/derp/anything", nil)
	for _, header := range []http.Header{nil, {"Derpd-Mesh": {""}}, {"Derpd-Mesh": {strings.Repeat("0", 64), meshSecret}}} {
		got := do(t, client, http.MethodGet, base+"/derp/mesh", header)
		got.header.Del("Date")
		unknown.header.Del("Date")
		if fmt.Sprint(got) != fmt.Sprint(unknown) {
			t.Errorf("%v: %v, want %v, as for any path", header, got, unknown)
		}
	}
}

// TestMeshIgnoresItself asserts that a node recognizes its own entry in
// DERP_MESH_WITH, by its address or by its node key.
func TestMeshIgnoresItself(t *testing.T) {
	list := meshNodes(t, 1)
	if c, err := config.Load(testkit.LastOfEach(list[0].env)); err != nil || len(c.Mesh.Nodes) != 0 {
		t.Errorf("%v, %v; want no other node", c.Mesh.Nodes, err)
	}
	env := append(list[0].env, "DERP_MESH_WITH=127.0.0.1:1/127.0.0.1:"+list[0].port+"="+list[0].pin)
	n := begin(t, env)
	testkit.Until(t, "the node finds itself", func() bool { return n.relay.Mesh().States()[0].Self })
	if got := meshHealth(n); got != "ok DERP_MESH_WITH names no other node" {
		t.Error(got)
	}
	if got := scrape(t, n); strings.Contains(got, "derpd_mesh_up{") {
		t.Error("metrics count the node itself:\n" + got)
	}
	region(t, currentMap(t, n)) // fails unless the map has one node
}

// TestMeshVerifies asserts that a node verifies the certificates of other
// nodes, by hash or by authority.
func TestMeshVerifies(t *testing.T) {
	authority := acmetest.Start(t)
	list := meshNodes(t, 2)
	domain := freshName("mesh")
	c, err := config.Load(testkit.LastOfEach(append(list[1].env, "DERP_DOMAIN="+domain, "DERP_ACME_CA="+authority.Directory, "DERP_ACME_CA_ROOTS="+authority.RootsFile)))
	if err != nil {
		t.Fatal(err)
	}
	signed := beginConfig(t, c, nil, func(n *Node) {
		authority.Validate(t, port(n.listeners.http.Addr()), port(n.listeners.https.Addr()))
	})
	entry := domain + ":" + list[1].port + "/127.0.0.1"
	for name, tt := range map[string]struct {
		entry string
		trust bool
		want  string
	}{
		"signed":       {entry, true, ""},
		"untrusted":    {entry, false, "x509: certificate signed by unknown authority; if the authority is a private one, set DERP_CA_ROOTS to its roots"},
		"another name": {"a." + entry, true, "remote error: tls: "},
		"another hash": {entry + "=" + list[0].pin, true, "cert hash does not match expected cert hash"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := config.Load(testkit.LastOfEach(append(list[0].env, "DERP_MESH_WITH="+tt.entry, "DERP_CA_ROOTS="+authority.RootsFile)))
			if err != nil {
				t.Fatal(err)
			}
			if tt.trust {
				// The file has the root of the authority's own server.
				c.Mesh.Roots.AddCert(authority.Root())
			}
			n := beginConfig(t, c, nil)
			defer n.stop()
			if tt.want != "" {
				testkit.Until(t, "health has the reason", func() bool { return strings.Contains(meshHealth(n), tt.want) })
				return
			}
			awaitMesh(t, n, signed)
			a, b := clientOf(t, n, key.NewNode()), testkit.RegionClient(t, onLoopback(t, signed), key.NewNode())
			b.TLSConfig = testkit.Trust(authority.Roots())
			testkit.MustAdmit(t, b)
			reachBothWays(t, a, b)
		})
	}
}

// onLoopback is alone with the loopback address, for a node whose name is not
// in DNS.
func onLoopback(t *testing.T, n *testNode) *tailcfg.DERPRegion {
	t.Helper()
	r := alone(t, n)
	r.Nodes[0].IPv4, r.Nodes[0].IPv6 = "127.0.0.1", "none"
	return r
}

// TestMeshInModeOff runs a node behind a TLS proxy. Other nodes connect through
// the proxy, and the node connects to them directly.
func TestMeshInModeOff(t *testing.T) {
	list := meshNodes(t, 2)
	front := list[1].port
	pinned, err := certs.LoadPinned(certs.PinnedConfig{Path: filepath.Join(dataDir(list[1].env), "certs", "pinned.pem")})
	if err != nil {
		t.Fatal(err)
	}
	behind := strconv.Itoa(testkit.FreePort(t))
	ln, err := tls.Listen("tcp", "127.0.0.1:"+front, &tls.Config{GetCertificate: pinned.GetCertificate, MinVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	forward(t, ln, "127.0.0.1:"+behind, nil)
	off := begin(t, append(list[1].env, "DERP_ADDR=127.0.0.1:"+behind, "DERP_CERT_MODE=off", "DERP_DOMAIN=derp.example.com", "DERP_PUBLIC_PORT="+front))
	direct := begin(t, list[0].env)
	awaitMesh(t, off, direct)
	c := testkit.URLClient(t, "http://127.0.0.1:"+behind+"/derp", key.NewNode())
	testkit.MustAdmit(t, c)
	reachBothWays(t, c, clientOf(t, direct, key.NewNode()))
}

// dataDir is the value of DERP_DATA_DIR.
func dataDir(env []string) string {
	for _, pair := range slices.Backward(env) {
		if dir, ok := strings.CutPrefix(pair, "DERP_DATA_DIR="); ok {
			return dir
		}
	}
	return ""
}

// gated blocks writes while the gate is locked.
type gated struct {
	gate *sync.RWMutex
	io.Writer
}

func (g gated) Write(p []byte) (int, error) {
	g.gate.RLock()
	defer g.gate.RUnlock()
	return g.Writer.Write(p)
}

// forward connects every connection of ln to addr. A locked gate blocks the
// bytes; nil for no gate.
func forward(t *testing.T, ln net.Listener, addr string, gate *sync.RWMutex) {
	t.Helper()
	if gate == nil {
		gate = new(sync.RWMutex)
	}
	var all sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	pass := func(to, from net.Conn) {
		_, _ = io.Copy(gated{gate, to}, from)
		_, _ = to.Close(), from.Close()
	}
	all.Go(func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			out, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
			if err != nil {
				_ = in.Close()
				continue
			}
			context.AfterFunc(ctx, func() { _, _ = in.Close(), out.Close() })
			all.Go(func() { pass(out, in) })
			all.Go(func() { pass(in, out) })
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		cancel()
		all.Wait()
	})
}

// TestMeshNoticesSilence blocks the connection between two nodes without
// closing it. The node reports the other one as down, and connects again
// afterwards.
func TestMeshNoticesSilence(t *testing.T) {
	list := meshNodes(t, 2)
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var gate sync.RWMutex
	forward(t, ln, "127.0.0.1:"+list[1].port, &gate)
	c, err := config.Load(testkit.LastOfEach(append(list[0].env, "DERP_MESH_WITH=127.0.0.1:"+list[1].port+"/"+ln.Addr().String()+"="+list[1].pin)))
	if err != nil {
		t.Fatal(err)
	}
	other := begin(t, list[1].env)
	n := beginConfig(t, c, nil)
	awaitMesh(t, n, other)

	gate.Lock()
	begun := time.Now()
	testkit.Until(t, "the silence is noticed", func() bool { return strings.Contains(meshHealth(n), "the node stopped answering") })
	t.Logf("noticed after %s", time.Since(begun).Round(time.Millisecond))
	gate.Unlock()
	awaitMesh(t, n)
	reachBothWays(t, clientOf(t, n, key.NewNode()), clientOf(t, other, key.NewNode()))
}
