// Package derpmap writes the documents by which clients learn about a relay:
// the region and its node, as Tailscale's policy file, Headscale's
// configuration and tailcfg's own JSON want them.
package derpmap

import (
	"cmp"
	"slices"
	"strconv"

	"tailscale.com/tailcfg"
)

// None in an address field tells clients not to use that address family, and
// not to ask DNS about it.
const None = "none"

// Node is what clients need to know about one relay, as they see it from
// outside.
type Node struct {
	RegionID   int    // 900 to 999 are for users
	RegionCode string // short, such as "sha"
	RegionName string // for people, such as "Shanghai"
	Name       string // unique over the whole map

	// HostName is dialled, and sent as SNI: a DNS name or an address.
	HostName string

	// CertName is empty when HostName is the name to verify; otherwise
	// another name, or "sha256-raw:" and the hash of a self-signed
	// certificate.
	CertName string

	// IPv4 and IPv6 are addresses, empty for a DNS look-up, or None.
	IPv4, IPv6 string

	Port     int // of DERP over HTTPS
	STUNPort int // -1 when there is no STUN
	HTTPPort int // of plain HTTP; -1 when there is none
}

// defaultPort is the port that a zero in a map means.
func defaultPort(port, zeroMeans int) int {
	if port == zeroMeans {
		return 0
	}
	return port
}

// New returns the map of one region with the given nodes, of which there is at
// least one. The order is that of their names, whoever prints the map: clients
// try them in this order. A node that is given twice is in it once, and nodes
// that were left with the same name get other letters.
func New(nodes ...Node) *tailcfg.DERPMap {
	id := tailcfg.DERPRegionID(nodes[0].RegionID)
	region := &tailcfg.DERPRegion{RegionID: id, RegionCode: nodes[0].RegionCode, RegionName: nodes[0].RegionName}
	for _, n := range distinct(nodes) {
		region.Nodes = append(region.Nodes, &tailcfg.DERPNode{
			Name:     n.Name,
			RegionID: id,
			HostName: n.HostName,
			CertName: n.CertName,
			IPv4:     n.IPv4,
			IPv6:     n.IPv6,
			DERPPort: defaultPort(n.Port, 443),
			STUNPort: defaultPort(n.STUNPort, 3478),
			// Clients ask port 80 of the IPv4 address itself, and no
			// other port (tailscale.com/net/captivedetection).
			CanPort80: n.HTTPPort == 80 && n.IPv4 != "" && n.IPv4 != None,
		})
	}
	return &tailcfg.DERPMap{Regions: map[tailcfg.DERPRegionID]*tailcfg.DERPRegion{id: region}}
}

func distinct(nodes []Node) []Node {
	nodes = slices.Clone(nodes)
	byName := func(a, b Node) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.HostName, b.HostName), cmp.Compare(a.Port, b.Port))
	}
	slices.SortFunc(nodes, byName)
	nodes = slices.CompactFunc(nodes, func(a, b Node) bool { return byName(a, b) == 0 })
	taken, seen := make(map[string]bool), make(map[string]bool)
	for _, n := range nodes {
		taken[n.Name] = true
	}
	for i, n := range nodes {
		if seen[n.Name] {
			nodes[i].Name = freeName(n.RegionID, taken)
			taken[nodes[i].Name] = true
		}
		seen[n.Name] = true
	}
	slices.SortFunc(nodes, byName)
	return nodes
}

// freeName is the first in upstream's custom that is not taken.
func freeName(regionID int, taken map[string]bool) string {
	for i := 0; ; i++ {
		letter := string(rune('a' + i%26))
		if i >= 26 {
			letter += strconv.Itoa(i / 26)
		}
		if name := strconv.Itoa(regionID) + letter; !taken[name] {
			return name
		}
	}
}

// DefaultNodeName is the name of the first node of a region, by upstream's
// custom ("1a", "1b", …).
func DefaultNodeName(regionID int) string { return strconv.Itoa(regionID) + "a" }
