package config

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"tailscale.com/types/key"

	"derpd/relay"
)

// MeshEnv are the other nodes of the region.
type MeshEnv struct {
	MeshWith string `envconfig:"DERP_MESH_WITH" desc:"the nodes of this region, which then forward to each other, comma-separated: HOST[:PORT][/DIAL-ADDRESS][=sha256-raw:HASH]; this one may be among them" zh:"本区域的各个节点，它们会互相转发，逗号分隔：HOST[:PORT][/连接地址][=sha256-raw:哈希]；其中可以有本节点自己"`
	MeshKey  string `envconfig:"DERP_MESH_KEY" secret:"true" desc:"the secret that they share: 64 hex digits, or a passphrase of 20 characters or more without commas; to change it, set the new one on every node and restart them" zh:"各节点共有的密钥：64 位十六进制数字，或至少 20 个字符、不含逗号的口令；要更换时，在每个节点上设置新密钥并重启"`
}

// self is what clients dial to reach this node.
type self struct {
	names []string
	port  int
}

// is recognises this node in DERP_MESH_WITH. Behind a router the node may not
// reach itself by its public address, and so could not find out by dialing.
func (s self) is(n relay.MeshNode) bool {
	return n.Dial == "" && n.Port == s.port && slices.Contains(s.names, n.Host)
}

// parseMesh returns the other nodes and the key. Without DERP_MESH_WITH there is
// no mesh.
func parseMesh(p *problems, env MeshEnv, self self, roots roots) relay.MeshConfig {
	c := relay.MeshConfig{Nodes: parseMeshNodes(p, env.MeshWith, self), Roots: roots.others}
	switch {
	case env.MeshWith != "" && env.MeshKey == "" && !p.has("DERP_MESH_KEY"):
		p.add("DERP_MESH_KEY", "want the secret that the nodes of DERP_MESH_WITH share (openssl rand -hex 32), got nothing")
	case env.MeshWith == "" && env.MeshKey != "" && !p.has("DERP_MESH_WITH"):
		p.add("DERP_MESH_KEY", "is only used with DERP_MESH_WITH, but that is not set; set that, or remove this")
	}
	if env.MeshKey != "" {
		c.Key = parseMeshKey(p, env.MeshKey)
	}
	return c
}

// parseMeshKey parses the one key. A comma or a line break separates several keys
// and is not part of a passphrase.
func parseMeshKey(p *problems, value string) key.DERPMesh {
	if strings.ContainsAny(value, ",\r\n") {
		p.add("DERP_MESH_KEY", "want one key without commas and line breaks, got several; to change the key, set the new one on every node and restart them")
		return key.DERPMesh{}
	}
	k, err := relay.ParseMeshKey(value)
	if err != nil {
		p.add("DERP_MESH_KEY", "%w", err)
	}
	return k
}

func parseMeshNodes(p *problems, value string, self self) []relay.MeshNode {
	var nodes []relay.MeshNode
	for _, entry := range p.list("DERP_MESH_WITH", value) {
		n, err := parseMeshNode(entry)
		switch {
		case err != nil:
			p.add("DERP_MESH_WITH", "%w", err)
		case slices.ContainsFunc(nodes, func(other relay.MeshNode) bool { return other.String() == n.String() }):
			p.add("DERP_MESH_WITH", "%q is there twice; remove one of the two", n)
		case !self.is(n):
			nodes = append(nodes, n)
		}
	}
	return nodes
}

// parseMeshNode parses HOST[:PORT][/DIAL-ADDRESS][=sha256-raw:HASH].
func parseMeshNode(entry string) (n relay.MeshNode, err error) {
	wrong := func(want string) (relay.MeshNode, error) {
		return relay.MeshNode{}, fmt.Errorf("want %s, got %q", want, entry)
	}
	if strings.Contains(entry, "://") {
		return wrong("a node without a scheme, such as derp2.example.com or derp2.example.com:8443")
	}
	address, hash, pinned := strings.Cut(entry, "=")
	if pinned {
		digits, ok := strings.CutPrefix(hash, "sha256-raw:")
		if sum, err := hex.DecodeString(digits); !ok || err != nil || len(sum) != sha256.Size {
			return wrong("sha256-raw: and 64 hex digits after =, as in CertName in the map of that node")
		}
		n.CertHash = strings.ToLower(digits)
	}
	name, dial, elsewhere := strings.Cut(address, "/")
	var ok bool
	if n.Host, n.Port, ok = splitNodeAddress(name, 443); !ok {
		return wrong("HOST[:PORT][/DIAL-ADDRESS][=sha256-raw:HASH]")
	}
	if elsewhere {
		host, port, ok := splitNodeAddress(dial, n.Port)
		if !ok {
			return wrong("a host or an address, with or without a port, after /")
		}
		n.Dial = net.JoinHostPort(host, strconv.Itoa(port))
	}
	return n, nil
}

// splitNodeAddress splits a name or an address from its port, if it has one. An
// IPv6 address with a port has brackets.
func splitNodeAddress(s string, defaultPort int) (host string, port int, ok bool) {
	host, port = s, defaultPort
	if bare := strings.TrimSuffix(strings.TrimPrefix(s, "["), "]"); net.ParseIP(bare) != nil {
		host = bare
	} else if h, p, err := net.SplitHostPort(s); err == nil {
		host, port = h, PortOf(s)
		if port < 1 || port > 65535 || p == "" {
			return "", 0, false
		}
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		return addr.Unmap().String(), port, addr.Zone() == "" && !addr.IsUnspecified()
	}
	return strings.ToLower(strings.TrimSuffix(host, ".")), port, isHostName(host) && !incompleteAddress.MatchString(host)
}
