package main

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// containerGateways are the gateways of the container's own network: where a
// packet of Docker's proxy seems to come from. On any other network there are
// none, since there the gateway is a real router, which may ask STUN in its own
// name. What makes the difference is both of these:
//
//   - a mark that Docker, Podman, CRI-O or Kubernetes leaves in the file system.
//     Without it, this may be a whole machine (LXC) on the router's network;
//   - that the default route goes through a virtual cable (veth) or a program
//     (tun) that the engine has put into the container. On the host's network,
//     in a virtual machine and with macvlan it goes through something else.
//
// The file system of the container begins at root; driver names the driver of
// an interface.
func containerGateways(root string, driver func(name string) string) []netip.Addr {
	if !inContainer(root) && !inPod(root) {
		return nil
	}
	var list []netip.Addr
	for _, r := range slices.Concat(routes4(root), routes6(root)) {
		if d := driver(r.iface); (d == "veth" || d == "tun") && !slices.Contains(list, r.gateway) {
			list = append(list, r.gateway)
		}
	}
	return list
}

// inContainer reports whether Docker, Podman or CRI-O left its mark.
func inContainer(root string) bool {
	for _, marker := range []string{".dockerenv", "run/.containerenv"} {
		if _, err := os.Stat(filepath.Join(root, marker)); err == nil {
			return true
		}
	}
	return false
}

// inPod reports whether the kubelet wrote the hosts file, as it does in every
// pod whatever the runtime.
func inPod(root string) bool {
	hosts, err := os.ReadFile(filepath.Join(root, "etc/hosts"))
	return err == nil && strings.HasPrefix(string(hosts), "# Kubernetes-managed hosts file")
}

// route is a default route through a gateway.
type route struct {
	iface   string
	gateway netip.Addr
}

// usable are the flags of a route that is up and leads through a gateway
// (RTF_UP and RTF_GATEWAY in linux/route.h).
const usable = 0x1 | 0x2

// routes4 reads proc_net(5)'s route: Iface Destination Gateway Flags RefCnt Use
// Metric Mask and more, numbers in hexadecimal, addresses as the machine has
// them in memory.
func routes4(root string) []route {
	var list []route
	for _, f := range fields(filepath.Join(root, "proc/net/route")) {
		if len(f) < 8 || f[1] != "00000000" || f[7] != "00000000" || !hasFlags(f[3]) {
			continue
		}
		raw, err := strconv.ParseUint(f[2], 16, 32)
		if err != nil {
			continue
		}
		var b [4]byte
		binary.NativeEndian.PutUint32(b[:], uint32(raw))
		list = append(list, route{f[0], netip.AddrFrom4(b)})
	}
	return list
}

// routes6 reads ipv6_route: destination, its prefix length, source, its prefix
// length, next hop, metric, two counters, flags, interface.
func routes6(root string) []route {
	var list []route
	for _, f := range fields(filepath.Join(root, "proc/net/ipv6_route")) {
		if len(f) < 10 || f[0] != strings.Repeat("0", 32) || f[1] != "00" || !hasFlags(f[8]) {
			continue
		}
		if raw, err := hex.DecodeString(f[4]); err == nil && len(raw) == 16 {
			list = append(list, route{f[9], netip.AddrFrom16([16]byte(raw))})
		}
	}
	return list
}

func hasFlags(field string) bool {
	flags, err := strconv.ParseUint(field, 16, 32)
	return err == nil && flags&usable == usable
}

// fields are the words of each line. A kernel without the protocol has no such
// file, and so no such gateway.
func fields(path string) [][]string {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	var list [][]string
	for line := range strings.Lines(string(text)) {
		list = append(list, strings.Fields(line))
	}
	return list
}
