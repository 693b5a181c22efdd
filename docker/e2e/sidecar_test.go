//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tailscale.com/types/key"

	"derpd/internal/testkit"
	"derpd/internal/testkit/peers"
)

// admitSidecar is the profile tailscaled: the relay admits the nodes of the network
// that its sidecar has joined, with a real headscale. No other relay is in the map of
// that network, so the sidecar needs the relay too.
func admitSidecar(t *testing.T, r *row) {
	image := peersImage(t)
	// Every container reaches this machine by the first address of Docker's bridge.
	bridge, err := netip.ParsePrefix(docker(t, "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Subnet}}"))
	if err != nil {
		t.Fatal(err)
	}
	gateway := bridge.Masked().Addr().Next().String()
	h := peers.NewHeadscaleAt(t, gateway)
	derpPort, httpPort, stunPort := testkit.FreePort(t), testkit.FreePort(t), testkit.FreePort(t)
	secrets := t.TempDir()
	if err := os.Chmod(secrets, 0o755); err != nil {
		t.Fatal(err)
	}
	env := writeFile(t, ".env", fmt.Sprintf(`DERP_PUBLIC_PORT=%d
DERP_PUBLIC_HTTP_PORT=%d
DERP_PUBLIC_STUN_PORT=%d
TAILSCALE_IMAGE=%s
TS_EXTRA_ARGS=--login-server=%s
`, derpPort, httpPort, stunPort, image, h.URL))
	// Settings that an operator writes into .env, a file that the test must not use.
	settings := writeFile(t, "settings.yaml", fmt.Sprintf(`services:
  relay:
    environment:
      DERP_VERIFY_CLIENTS: "true"
      DERP_VERIFY_INTERVAL: 1s
      DERP_PUBLIC_IPV4: %s
      DERP_PUBLIC_IPV6: none
    depends_on: !reset {}
  tailscaled:
    entrypoint: [/bin/containerboot]
    environment:
      TS_NO_LOGS_NO_SUPPORT: "true"
    volumes: ["%s:/run/secrets:ro"]
`, gateway, secrets))
	d := up(t, "-f", "compose.yaml", "-f", settings, "--env-file", env)

	// Headscale needs the map at its start, and the map needs the relay's
	// certificate.
	h.SetMap(t, []byte(d.must(t, "exec", "-T", "relay", "/derpd", "derpmap", "--format", "headscale")))
	h.Start(t)
	if err := os.WriteFile(filepath.Join(secrets, "tailscale-authkey"), []byte(h.AuthKey(t, "relay")), 0o644); err != nil {
		t.Fatal(err)
	}
	d.args = append(d.args, "--profile", "tailscaled")
	if out, err := run(t.Context(), upTimeout, append(d.args, "up", "-d", "--wait", "--no-build")...); err != nil {
		t.Fatalf("starting tailscaled: %v\n%s", err, out)
	}

	member := peers.StartTailscaled(t, h, "member")
	member.Up(t, h.AuthKey(t, "somebody")) // returns once it is connected to the relay
	memberKey := member.NodeKey(t)
	says := func(node key.NodePublic, want string) {
		t.Helper()
		testkit.Wait(t, "the relay to say "+want, func(context.Context) error {
			out, _ := d.compose(t, "exec", "-T", "relay", "/derpd", "admit", node.String())
			if !strings.Contains(out, want) {
				return errors.New(out)
			}
			return nil
		})
	}
	says(memberKey, "admitted: a source says yes")
	says(key.NewNode().Public(), "refused: every source says no")

	// A restarted tailscaled replaces its socket, and reads its state from the volume.
	d.must(t, "restart", "tailscaled")
	says(memberKey, "admitted: a source says yes")
	says(key.NewNode().Public(), "refused: every source says no")

	h.Delete(t, memberKey)
	says(memberKey, "refused: every source says no")
	r.saw("member admitted, unknown node refused, also after a restart; removed member refused")

	id := d.must(t, "ps", "--quiet", "tailscaled")
	for format, want := range map[string]string{
		"{{.HostConfig.CapDrop}} {{.HostConfig.CapAdd}}":                                          "[ALL] []",
		"{{.HostConfig.Privileged}} {{len .HostConfig.Devices}} {{len .HostConfig.PortBindings}}": "false 0 0",
	} {
		if got := docker(t, "inspect", "--format", format, id); got != want {
			t.Errorf("the sidecar has %s, want %s", got, want)
		}
	}
}
