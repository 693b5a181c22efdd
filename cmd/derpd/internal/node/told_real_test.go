package node

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"derpd/cmd/derpd/internal/admin"
	"derpd/internal/testkit"
	"derpd/internal/testkit/peers"
)

// TestRealNodeIsTold asserts that `tailscale status` of a real node that is refused
// has the reason within ten seconds, that the node then connects at most three
// times a minute, and that the reason is gone within a minute of its admission.
func TestRealNodeIsTold(t *testing.T) {
	t.Parallel()
	const (
		toldWithin  = 10 * time.Second
		counted     = 90 * time.Second
		goneWithin  = time.Minute
		perMinute   = 3
		problem     = "is reporting an issue: "
		notAdmitted = problem + "this relay does not admit this node, whose key is "
	)
	var allow atomic.Bool
	allow.Store(true)
	source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer(http.StatusOK, fmt.Sprintf(`{"Allow":%t}`, allow.Load()))(w, r)
	}))
	t.Cleanup(source.Close)
	h := peers.NewHeadscale(t)
	n := begin(t, testkit.Environ(t, "DERP_VERIFY_CLIENT_URL="+source.URL, "DERP_VERIFY_INTERVAL=1s"))
	printed, err := admin.Client{Addr: n.listeners.admin.Addr().String()}.Map(t.Context(), "headscale")
	if err != nil {
		t.Fatal(err)
	}
	h.SetMap(t, printed)
	h.Start(t)
	node := peers.StartTailscaled(t, h, "told")
	node.Up(t, h.AuthKey(t, "somebody"))

	refused := func() uint64 { return n.gate.Load().Counts().Refused }
	health := func() string { return strings.Join(node.Status(t).Health, "\n") }
	awaitText := func(limit time.Duration, want string) {
		t.Helper()
		begun := time.Now()
		testkit.Within(t, limit, "the text "+want, func(context.Context) error {
			got := node.Status(t).Health
			if found := slices.ContainsFunc(got, func(line string) bool { return strings.Contains(line, problem) }); want == "" && !found {
				return nil
			}
			if want != "" && strings.Contains(health(), want) {
				return nil
			}
			return fmt.Errorf("health is %q", got)
		})
		t.Logf("%q after %s", want, time.Since(begun).Round(time.Millisecond))
	}
	awaitText(goneWithin, "")

	allow.Store(false)
	awaitText(toldWithin, notAdmitted+node.NodeKey(t).ShortString())
	before := refused()
	<-time.After(counted)
	if got, most := refused()-before, uint64(perMinute*counted/time.Minute); got > most {
		t.Errorf("the refused node connected %d times in %s, want at most %d", got, counted, most)
	} else {
		t.Logf("the refused node connected %d times in %s", got, counted)
	}
	if got := health(); !strings.Contains(got, notAdmitted) {
		t.Errorf("the text is gone while the node is refused: %q", got)
	}

	allow.Store(true)
	awaitText(goneWithin, "")

	testkit.Until(t, "the node is connected", func() bool {
		_, connected := n.connected()[node.NodeKey(t)]
		return connected
	})
	n.stop()
	awaitText(toldWithin, problem+"this relay is stopping")
}
