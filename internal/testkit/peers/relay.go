package peers

import (
	"net"
	"net/http/httptest"
	"testing"

	"go.yaml.in/yaml/v3"
	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stun/stuntest"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"derpd/internal/testkit"
)

// StartRelay starts upstream's relay, open to all nodes, and returns its DERP map for
// [Headscale.SetMap]. Tests without a derpd need this relay, because tailscaled is
// running only while it is connected to a relay.
func StartRelay(t testing.TB) []byte {
	t.Helper()
	relay := derpserver.New(key.NewNode(), logger.Discard)
	server := httptest.NewTLSServer(derpserver.Handler(relay))
	stun, stopSTUN := stuntest.Serve(t)
	t.Cleanup(func() {
		stopSTUN()
		_ = relay.Close()
		server.Close()
	})
	text, err := yaml.Marshal(tailcfg.DERPMap{Regions: map[tailcfg.DERPRegionID]*tailcfg.DERPRegion{900: {
		RegionID: 900, RegionCode: "test", RegionName: "test",
		Nodes: []*tailcfg.DERPNode{{
			Name: "900a", RegionID: 900, HostName: "127.0.0.1", IPv4: "127.0.0.1", IPv6: "none",
			CertName: "sha256-raw:" + testkit.Hash(server.Certificate()),
			DERPPort: server.Listener.Addr().(*net.TCPAddr).Port, STUNPort: stun.Port,
		}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	return text
}
