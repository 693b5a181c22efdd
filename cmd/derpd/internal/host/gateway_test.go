package host

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestContainerGateways(t *testing.T) {
	native := func(addr string) string {
		b := netip.MustParseAddr(addr).As4()
		return fmt.Sprintf("%08X", binary.NativeEndian.Uint32(b[:]))
	}
	// As a container on a network with both families has them.
	route4 := "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n" +
		"eth0\t00000000\t" + native("172.17.0.1") + "\t0003\t0\t0\t0\t00000000\t0\t0\t0\n" +
		"eth0\t" + native("172.17.0.0") + "\t00000000\t0001\t0\t0\t0\t" + native("255.255.0.0") + "\t0\t0\t0\n" +
		"eth0\t" + native("10.0.0.0") + "\t" + native("172.17.0.9") + "\t0003\t0\t0\t0\t" + native("255.0.0.0") + "\t0\t0\t0\n"
	route6 := "fd000000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n" +
		"00000000000000000000000000000000 00 00000000000000000000000000000000 00 fd000000000000000000000000000001 00000400 00000002 00000000 00000003     eth0\n" +
		"00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo\n"
	docker := map[string]string{".dockerenv": "", "proc/net/route": route4, "proc/net/ipv6_route": route6}
	with := func(files map[string]string, name, content string) map[string]string {
		out := map[string]string{name: content}
		for k, v := range files {
			if _, replaced := out[k]; !replaced {
				out[k] = v
			}
		}
		return out
	}
	machine := map[string]string{"proc/net/route": route4, "proc/net/ipv6_route": route6, "etc/hosts": "127.0.0.1\tlocalhost\n"}
	for name, tt := range map[string]struct {
		files  map[string]string
		driver string
		want   string
	}{
		"Docker":                          {docker, "veth", "172.17.0.1 fd00::1"},
		"Podman":                          {with(machine, "run/.containerenv", ""), "veth", "172.17.0.1 fd00::1"},
		"Podman without root":             {with(machine, "run/.containerenv", ""), "tun", "172.17.0.1 fd00::1"},
		"Kubernetes":                      {with(machine, "etc/hosts", "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"), "veth", "172.17.0.1 fd00::1"},
		"without IPv6":                    {with(docker, "proc/net/ipv6_route", ""), "veth", "172.17.0.1"},
		"the host's network":              {docker, "virtio_net", ""},
		"the host's network in a pod":     {with(machine, "etc/hosts", "# Kubernetes-managed hosts file (host network).\n"), "ena", ""},
		"macvlan":                         {docker, "macvlan", ""},
		"a network without a way out":     {with(docker, "proc/net/route", "Iface\n"), "veth", "fd00::1"},
		"a machine":                       {machine, "igb", ""},
		"a machine in LXC":                {machine, "veth", ""},
		"a machine with a VPN as way out": {machine, "tun", ""},
		"no driver to be had":             {docker, "", ""},
		"VPN routes for half of the internet each": {map[string]string{
			".dockerenv": "",
			"proc/net/route": "Iface\n" +
				"eth0\t00000000\t" + native("172.17.0.1") + "\t0003\t0\t0\t0\t" + native("128.0.0.0") + "\t0\t0\t0\n" +
				"eth0\t" + native("128.0.0.0") + "\t" + native("172.17.0.1") + "\t0003\t0\t0\t0\t00000000\t0\t0\t0\n",
			"proc/net/ipv6_route": strings.Repeat("0", 32) + " 01 " + strings.Repeat("0", 32) + " 00 fd000000000000000000000000000001 00000400 00000002 00000000 00000003     eth0\n" +
				"80" + strings.Repeat("0", 30) + " 00 " + strings.Repeat("0", 32) + " 00 fd000000000000000000000000000001 00000400 00000002 00000000 00000003     eth0\n",
		}, "veth", ""},
		"routes that are down or have no gateway": {map[string]string{
			".dockerenv": "",
			"proc/net/route": "Iface\n" +
				"eth0\t00000000\t" + native("172.17.0.1") + "\t0002\t0\t0\t0\t00000000\t0\t0\t0\n" +
				"eth0\t00000000\t" + native("172.17.0.2") + "\t0001\t0\t0\t0\t00000000\t0\t0\t0\n",
		}, "veth", ""},
		"the same gateway twice": {with(with(docker, "proc/net/ipv6_route", ""), "proc/net/route", route4+"eth0\t00000000\t"+native("172.17.0.1")+"\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"), "veth", "172.17.0.1"},
		"nonsense":               {with(docker, "proc/net/route", "eth0\t00000000\tZZ\t0003\t0\t0\t0\t00000000\n\n"), "veth", "fd00::1"},
	} {
		root := t.TempDir()
		for file, content := range tt.files {
			path := filepath.Join(root, file)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		var got []string
		for _, addr := range containerGateways(root, func(string) string { return tt.driver }) {
			got = append(got, addr.String())
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}
