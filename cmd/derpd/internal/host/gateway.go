package host

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

// ContainerGateways returns the gateways of the container's own network. Docker's
// port proxy uses them as the source address of forwarded packets. The result
// is empty on any other network, where the gateway is a real router that may
// send STUN requests of its own. Both conditions must hold:
//
//   - Docker, Podman, CRI-O or Kubernetes left a marker in the file system. A
//     machine without one may be a whole system (LXC) on the router's network.
//   - The default route uses a virtual cable (veth) or a program (tun) that the
//     engine created in the container. The host's network, a virtual machine
//     and macvlan use other drivers.
func ContainerGateways() []netip.Addr { return containerGateways("/", driverOf) }

// containerGateways is [ContainerGateways] for a file system below root. driver
// returns the driver of a network interface.
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

// route is a default route through a gateway.
type route struct {
	iface   string
	gateway netip.Addr
}

// upGateway are the flags of a route that is up and leads through a gateway:
// RTF_UP and RTF_GATEWAY of linux/route.h.
const upGateway = 0x1 | 0x2

// routes4 reads the route file of proc_net(5). Its columns are Iface,
// Destination, Gateway, Flags, RefCnt, Use, Metric, Mask and more. Numbers are
// hexadecimal; addresses are in the machine's byte order.
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

// routes6 reads ipv6_route. Its columns are the destination and its prefix
// length, the source and its prefix length, the next hop, metric, two counters,
// flags and the interface.
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
	return err == nil && flags&upGateway == upGateway
}

// fields returns the words of each line. The file is missing when the kernel
// lacks the protocol; the result is then empty.
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
