package peers

import (
	"crypto/sha256"
	"fmt"
	"net"
	"net/http/httptest"
	"testing"

	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stun/stuntest"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"derpd/relay/derpmap"
)

// StartRelay starts upstream's relay, open to all, and returns its map for
// [Headscale.SetMap]. It is for tests of something else: a node counts as
// running only while it is connected to some relay.
func StartRelay(t *testing.T) []byte {
	t.Helper()
	relay := derpserver.New(key.NewNode(), logger.Discard)
	server := httptest.NewTLSServer(derpserver.Handler(relay))
	stun, stopSTUN := stuntest.Serve(t)
	t.Cleanup(func() {
		stopSTUN()
		_ = relay.Close()
		server.Close()
	})
	regions, err := derpmap.Format("headscale", derpmap.New(derpmap.Node{
		RegionID: 900, RegionCode: "test", RegionName: "test", Name: "900a",
		HostName: "127.0.0.1", IPv4: "127.0.0.1", IPv6: derpmap.None,
		CertName: fmt.Sprintf("sha256-raw:%x", sha256.Sum256(server.Certificate().Raw)),
		Port:     server.Listener.Addr().(*net.TCPAddr).Port, STUNPort: stun.Port,
	}), nil)
	if err != nil {
		t.Fatal(err)
	}
	return regions
}
