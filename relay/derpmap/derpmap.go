// Package derpmap writes the documents by which clients learn about a relay:
// the region and its node, as Tailscale's policy file, Headscale's
// configuration and tailcfg's own JSON want them.
package derpmap

import (
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

// New returns the map of one region with the given node.
func New(n Node) *tailcfg.DERPMap {
	id := tailcfg.DERPRegionID(n.RegionID)
	return &tailcfg.DERPMap{
		Regions: map[tailcfg.DERPRegionID]*tailcfg.DERPRegion{
			id: {
				RegionID:   id,
				RegionCode: n.RegionCode,
				RegionName: n.RegionName,
				Nodes: []*tailcfg.DERPNode{{
					Name:     n.Name,
					RegionID: id,
					HostName: n.HostName,
					CertName: n.CertName,
					IPv4:     n.IPv4,
					IPv6:     n.IPv6,
					DERPPort: defaultPort(n.Port, 443),
					STUNPort: defaultPort(n.STUNPort, 3478),
					// Clients ask port 80 of the IPv4 address itself, and
					// no other port (tailscale.com/net/captivedetection).
					CanPort80: n.HTTPPort == 80 && n.IPv4 != "" && n.IPv4 != None,
				}},
			},
		},
	}
}

// DefaultNodeName is the name of the first node of a region, by upstream's
// custom ("1a", "1b", …).
func DefaultNodeName(regionID int) string { return strconv.Itoa(regionID) + "a" }
