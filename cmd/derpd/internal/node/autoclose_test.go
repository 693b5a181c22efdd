package node

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tailscale.com/derp/derphttp"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
	"derpd/internal/testkit/peers"
)

// open starts an open relay with DERP_VERIFY_CLIENTS=auto, and returns it with the path
// at which it looks for a socket.
func open(t *testing.T, env ...string) (n *testNode, log *logBuffer, socket string) {
	t.Helper()
	log, socket = new(logBuffer), filepath.Join(t.TempDir(), "tailscaled.sock")
	n = begin(t, testkit.Environ(t, append(env, "DERP_TAILSCALED_SOCKET="+socket)...), logTo(log))
	if !strings.Contains(string(n.printed), "This relay is open") {
		t.Fatal("the relay is not open at the start")
	}
	return n, log, socket
}

// ends returns how long a connection lives from now on.
func ends(t *testing.T, c *derphttp.Client) time.Duration {
	t.Helper()
	begin, ended := time.Now(), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			if _, err := c.Recv(); err != nil {
				return
			}
		}
	}()
	testkit.Receive(t, "the end of the connection", ended)
	return time.Since(begin)
}

// TestClosesWithASocket asserts that a tailscaled which starts after an open relay
// closes the relay: strangers go, members stay. The relay stays closed when the socket
// goes.
func TestClosesWithASocket(t *testing.T) {
	t.Parallel()
	n, log, socket := open(t)
	r := region(t, parsePolicy(t, n.printed))
	member, stranger := key.NewNode(), key.NewNode()
	stays, leaves := testkit.RegionClient(t, r, member), testkit.RegionClient(t, r, stranger)
	testkit.MustAdmit(t, stays, leaves)
	server := filepath.Join(t.TempDir(), "real.sock")
	serveSocket(t, server, localAPI(running, func(k key.NodePublic) bool { return k == member.Public() }))
	if err := os.Symlink(server, socket); err != nil {
		t.Fatal(err)
	}
	took := ends(t, leaves)
	t.Logf("disconnected after %s", took.Round(time.Millisecond))
	if most := socketInterval + listTime + 20*time.Second; took > most { // the interval is a minute
		t.Errorf("the stranger stayed for %s, want at most %s", took, most)
	}
	if err := connectAs(t, r, stranger); err == nil {
		t.Error("the stranger came back")
	}
	if err := connectAs(t, r, key.NewNode()); err == nil {
		t.Error("a new stranger is admitted")
	}
	if _, ok := n.connected()[member.Public()]; !ok {
		t.Error("the member was disconnected too")
	}
	if report := n.health.Report(t.Context()); !report.Ready || !strings.Contains(report.String(), "warn admission: closed since a tailscaled socket appeared") || !strings.Contains(report.String(), "tailscaled "+socket) {
		t.Errorf("health: %s", report)
	}
	if text, err := n.formatMap(t.Context(), "policy"); err != nil || strings.Contains(string(text), "open") {
		t.Errorf("the map calls a closed relay open: %v\n%s", err, text)
	}
	if !log.has(`"level":"warn"`, "only admitted nodes may use this relay from now on") {
		t.Error("the log does not say that the relay has closed")
	}

	if err := os.Remove(socket); err != nil {
		t.Fatal(err)
	}
	if err := connectAs(t, r, key.NewNode()); err == nil {
		t.Error("a stranger is admitted after the socket has gone")
	}
	if err := connectAs(t, r, member); err != nil {
		t.Errorf("the grace does not admit the member while the socket is away: %v", err)
	}
}

// TestClosesBeforeTheLogin asserts that nodes whom no source can judge go too, since
// they were never admitted.
func TestClosesBeforeTheLogin(t *testing.T) {
	t.Parallel()
	n, _, socket := open(t, "DERP_VERIFY_INTERVAL=1s")
	r := region(t, parsePolicy(t, n.printed))
	stranger := testkit.RegionClient(t, r, key.NewNode())
	testkit.MustAdmit(t, stranger)
	serveSocket(t, socket, localAPI(`{"BackendState":"NeedsLogin"}`, func(key.NodePublic) bool { return false }))
	if took := ends(t, stranger); took > n.config.Admission.Interval+socketInterval+evictAfter+5*time.Second {
		t.Errorf("the stranger stayed for %s", took)
	}
	if err := connectAs(t, r, key.NewNode()); err == nil {
		t.Error("a stranger is admitted")
	}
	if report := n.health.Report(t.Context()); !report.Ready || !strings.Contains(report.String(), "not logged in") {
		t.Errorf("health: %s", report)
	}
}

// TestClosesForAFileOrDirectory asserts that anything in the place of a socket closes
// the relay, and that health has the fix.
func TestClosesForAFileOrDirectory(t *testing.T) {
	t.Parallel()
	for name, appear := range map[string]func(path string) error{
		"is a directory":            func(path string) error { return os.Mkdir(path, 0o700) },
		"is a file":                 func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"no such file or directory": func(path string) error { return os.Symlink("/nonexistent", path) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, _, socket := open(t)
			if err := appear(socket); err != nil {
				t.Fatal(err)
			}
			testkit.Until(t, "the relay is closed", func() bool { return n.gate.Load() != nil })
			if err := connectAs(t, region(t, parsePolicy(t, n.printed)), key.NewNode()); err == nil {
				t.Error("a stranger is admitted")
			}
			testkit.Until(t, "health has the fix", func() bool {
				report := n.health.Report(t.Context())
				return report.Ready && strings.Contains(report.String(), "warn admission") && strings.Contains(report.String(), name)
			})
		})
	}
}

// TestRealTailscaledAppears starts a real tailscaled after the relay.
func TestRealTailscaledAppears(t *testing.T) {
	t.Parallel()
	h, member, _ := network(t)
	asked := peers.StartTailscaled(t, h, "asked")
	asked.Up(t, h.AuthKey(t, "somebody"))
	n, _, socket := open(t)
	r := region(t, parsePolicy(t, n.printed))
	stays, leaves := testkit.RegionClient(t, r, member), testkit.RegionClient(t, r, key.NewNode())
	testkit.MustAdmit(t, stays, leaves)
	if err := os.Symlink(asked.Socket, socket); err != nil {
		t.Fatal(err)
	}
	t.Logf("disconnected after %s", ends(t, leaves).Round(time.Millisecond))
	if err := connectAs(t, r, key.NewNode()); err == nil {
		t.Error("a stranger is admitted")
	}
	if _, ok := n.connected()[member.Public()]; !ok {
		t.Error("the member was disconnected too")
	}
}
