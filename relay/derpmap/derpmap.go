// Package derpmap builds the DERP map of a region and its nodes. It prints the map
// for Tailscale's policy file, for Headscale, and as tailcfg's own JSON.
package derpmap

import (
	"cmp"
	"slices"
	"strconv"

	"tailscale.com/tailcfg"
)

// None in an address field makes clients skip that address family, without a DNS
// query.
const None = "none"

// Node describes one relay as clients reach it from outside.
type Node struct {
	RegionID   int    // 900 to 999 are reserved for users
	RegionCode string // short, such as "sha"
	RegionName string // for people, such as "Shanghai"
	Name       string // unique over the whole map

	// HostName is a DNS name or an address. Clients dial it and send it as SNI.
	HostName string

	// CertName is the name that clients verify in the certificate. It is empty
	// for HostName, or "sha256-raw:" and the hash of a self-signed certificate.
	CertName string

	// IPv4 and IPv6 are addresses, None, or empty for a DNS query.
	IPv4, IPv6 string

	Port     int // of DERP over HTTPS
	STUNPort int // -1 when there is no STUN
	HTTPPort int // of plain HTTP; -1 when there is none
}

// mapPort returns the value of a port in the map, where 0 means the default.
func mapPort(port, standard int) int {
	if port == standard {
		return 0
	}
	return port
}

// New returns the map of one region with the given nodes. There must be at least
// one node. Clients try nodes in the order of the map, so New sorts them by name.
// The result does not depend on the order of the arguments. Duplicates are dropped,
// and nodes with the same name get other names.
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
			DERPPort: mapPort(n.Port, 443),
			STUNPort: mapPort(n.STUNPort, 3478),
			// Captive portal detection uses port 80 of the IPv4 address
			// only (tailscale.com/net/captivedetection).
			CanPort80: n.HTTPPort == 80 && n.IPv4 != "" && n.IPv4 != None,
		})
	}
	return &tailcfg.DERPMap{Regions: map[tailcfg.DERPRegionID]*tailcfg.DERPRegion{id: region}}
}

// distinct returns the nodes sorted, without duplicates, and with distinct names.
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

// freeName returns the first name that is not taken, in upstream's style.
func freeName(regionID int, taken map[string]bool) string {
	for i := 0; ; i++ { // ends, since taken is finite
		letter := string(rune('a' + i%26))
		if i >= 26 {
			letter += strconv.Itoa(i / 26)
		}
		if name := strconv.Itoa(regionID) + letter; !taken[name] {
			return name
		}
	}
}

// DefaultNodeName returns the name of the first node of a region, in upstream's
// style ("1a", "1b", …).
func DefaultNodeName(regionID int) string { return strconv.Itoa(regionID) + "a" }
