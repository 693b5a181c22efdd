package main

import (
	"context"
	"errors"
	"expvar"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"

	"tailscale.com/metrics"

	"derpd/healthz"
	"derpd/relay"
	"derpd/relay/derpmap"
)

// mesh reads who the other nodes of the region are.
func (p *parser) mesh(c *config) {
	for _, entry := range p.list("DERP_MESH_WITH", p.MeshWith) {
		n, err := parseMeshNode(entry)
		switch {
		case err != nil:
			p.fail("DERP_MESH_WITH", "%w", err)
		case slices.ContainsFunc(c.mesh.Nodes, func(other relay.MeshNode) bool { return other.String() == n.String() }):
			p.fail("DERP_MESH_WITH", "names %q twice", n)
		case !c.isSelf(n):
			c.mesh.Nodes = append(c.mesh.Nodes, n)
		}
	}
	keys := p.list("DERP_MESH_KEY", p.MeshKey)
	_, unreadable := p.fromFile["DERP_MESH_KEY"] // and then already reported
	switch {
	case p.MeshWith != "" && p.MeshKey == "" && !unreadable:
		p.fail("DERP_MESH_KEY", "want the secret that the nodes of DERP_MESH_WITH share (openssl rand -hex 32), got nothing")
	case p.MeshWith == "" && p.MeshKey != "":
		p.fail("DERP_MESH_KEY", "has no meaning without DERP_MESH_WITH; set that, or remove this")
	case len(keys) > 1:
		p.fail("DERP_MESH_KEY", "want one key, got %d; to change the key, set the new one on every node and restart them", len(keys))
	}
	for _, text := range keys {
		k, err := relay.ParseMeshKey(text)
		if err != nil {
			p.fail("DERP_MESH_KEY", "%w", err)
		}
		c.mesh.Key = k
	}
}

// isSelf recognises this node by what clients dial: behind a router it may not
// reach itself by that, and would never learn that it is itself.
func (c *config) isSelf(n relay.MeshNode) bool {
	names := append(slices.Clone(c.domains), c.node.IPv4, c.node.IPv6)
	return n.Dial == "" && n.Port == c.publicHTTPSPort(portOf(c.addr)) && slices.Contains(names, n.Host)
}

var certHash = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^sha256-raw:([0-9a-fA-F]{64})$`) })

// parseMeshNode reads HOST[:PORT][/DIAL-ADDRESS][=sha256-raw:HASH].
func parseMeshNode(entry string) (n relay.MeshNode, err error) {
	wrong := func(want string) (relay.MeshNode, error) {
		return relay.MeshNode{}, fmt.Errorf("want %s, got %q", want, entry)
	}
	if strings.Contains(entry, "://") {
		return wrong("a node without a scheme, such as derp2.example.com or derp2.example.com:8443")
	}
	address, hash, pinned := strings.Cut(entry, "=")
	if pinned {
		match := certHash().FindStringSubmatch(hash)
		if match == nil {
			return wrong("sha256-raw: and 64 hex digits after =, as the map of that node has it under CertName")
		}
		n.CertHash = strings.ToLower(match[1])
	}
	name, dial, elsewhere := strings.Cut(address, "/")
	var ok bool
	if n.Host, n.Port, ok = nodeAddress(name, 443); !ok {
		return wrong("HOST[:PORT][/DIAL-ADDRESS][=sha256-raw:HASH]")
	}
	if elsewhere {
		host, port, ok := nodeAddress(dial, n.Port)
		if !ok {
			return wrong("a host or an address, with or without a port, after /")
		}
		n.Dial = net.JoinHostPort(host, fmt.Sprint(port))
	}
	return n, nil
}

// nodeAddress splits a name or an address from its port, if it has one. An
// IPv6 address with a port has brackets.
func nodeAddress(s string, defaultPort int) (host string, port int, ok bool) {
	host, port = s, defaultPort
	if bare := strings.TrimSuffix(strings.TrimPrefix(s, "["), "]"); net.ParseIP(bare) != nil {
		host = bare
	} else if h, p, err := net.SplitHostPort(s); err == nil {
		host, port = h, portOf(s)
		if port < 1 || port > 65535 || p == "" {
			return "", 0, false
		}
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		return addr.Unmap().String(), port, addr.Zone() == "" && !addr.IsUnspecified()
	}
	return strings.ToLower(strings.TrimSuffix(host, ".")), port, isHostName(host) && !numeric.MatchString(host)
}

// meshed reports whether this node is one of several.
func (c *config) meshed() bool { return !c.mesh.Key.IsZero() }

func (n *node) checkMesh(context.Context) healthz.Result {
	var up, all int
	var bad []string
	for _, s := range n.relay.Mesh().States() {
		switch {
		case s.Self:
			continue
		case s.Up:
			up++
		case s.Err == nil:
			bad = append(bad, "connecting to "+s.Node)
		default:
			bad = append(bad, fmt.Sprintf("%s is down for %s: %v", s.Node, age(s.Since), shortNetError(s.Err)))
		}
		all++
	}
	switch {
	case all == 0:
		return healthz.Okf("DERP_MESH_WITH names no other node")
	case len(bad) > 0:
		// Not a failure: nothing gets better for the clients of this node
		// when it closes too.
		return healthz.Warnf("%d of %d nodes connected; %s", up, all, strings.Join(bad, "; "))
	}
	return healthz.Okf("%d of %d nodes connected", up, all)
}

// shortNetError leaves out the addresses of a connection: the node is named
// already.
func shortNetError(err error) error {
	if e, ok := errors.AsType[*net.OpError](err); ok && e.Op != "remote error" {
		return e.Err
	}
	return err
}

// nodeLabel is the label of the other nodes of the mesh.
type nodeLabel struct{ Node string }

func (n *node) meshMetrics() []expvar.KeyValue {
	if !n.config.meshed() {
		return nil
	}
	up := &metrics.MultiLabelMap[nodeLabel]{Type: "gauge", Help: "Whether packets are forwarded to the node."}
	clients := &metrics.MultiLabelMap[nodeLabel]{Type: "gauge", Help: "Clients that are connected to the node."}
	for _, s := range n.relay.Mesh().States() {
		if s.Self {
			continue
		}
		up.Set(nodeLabel{s.Node}, number(s.Up))
		clients.Set(nodeLabel{s.Node}, number(s.Clients))
	}
	return []expvar.KeyValue{{Key: "derpd_mesh_up", Value: up}, {Key: "derpd_mesh_clients", Value: clients}}
}

// describe is what this node tells the others about itself.
func (n *node) describe(ctx context.Context) (derpmap.Node, error) {
	select {
	case <-n.address:
	case <-ctx.Done():
		return derpmap.Node{}, ctx.Err()
	}
	node, _ := n.public()
	return node, nil
}

// region is this node and the others of its region, and notes about those
// that are missing.
func (n *node) region(ctx context.Context) ([]derpmap.Node, []string) {
	own, notes := n.public()
	list := []derpmap.Node{own}
	for _, d := range n.relay.Mesh().Descriptions(ctx) {
		switch {
		case d.Node.HostName == "":
			notes = append(notes, fmt.Sprintf("%s belongs here too, but could not be asked: %v.", d.From, shortNetError(d.Err)),
				"Print the map again (derpd derpmap) when it runs.")
		case d.Node.RegionID != own.RegionID:
			notes = append(notes, fmt.Sprintf("%s says that it is in region %d: give the nodes of DERP_MESH_WITH one DERP_REGION_ID.", d.From, d.Node.RegionID))
		default:
			list = append(list, d.Node)
		}
	}
	return list, notes
}
