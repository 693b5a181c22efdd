package admit

import (
	"strings"
	"sync"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// Description is what a source says about a node. Each field may be empty.
type Description struct {
	Name    string   // DNS name, such as phone.tail1234.ts.net
	Comment string   // comment in the list of node keys
	Tailnet string   // name that the operator gave to the tailnet
	Tags    []string // tag:guest and so on
}

// Domain is the name of the node's tailnet in DNS, such as tail1234.ts.net.
func (d Description) Domain() string {
	_, domain, _ := strings.Cut(d.Name, ".")
	return domain
}

// Describe returns what the first source that knows the node says about it. It does
// not wait for a source.
func (g *Gate) Describe(node key.NodePublic) Description {
	for _, s := range g.config.Sources {
		if s.Describe == nil {
			continue
		}
		if d, ok := s.Describe(node); ok {
			return d
		}
	}
	return Description{}
}

// maxDescriptions limits the memory of [descriptions].
const maxDescriptions = 50_000

// descriptions keeps what a source has said about the nodes that it admits.
type descriptions struct {
	mu    sync.Mutex
	nodes map[key.NodePublic]Description // at most maxDescriptions; guarded by mu
}

// keep stores the description of a node of tailscaled. A full table loses another node,
// until the next question about it.
func (d *descriptions) keep(node key.NodePublic, known *tailcfg.Node) {
	if known == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.nodes[node]; !ok && len(d.nodes) >= maxDescriptions {
		for other := range d.nodes {
			delete(d.nodes, other)
			break
		}
	}
	if d.nodes == nil {
		d.nodes = make(map[key.NodePublic]Description)
	}
	d.nodes[node] = Description{Name: strings.TrimSuffix(known.Name, "."), Tags: known.Tags}
}

// forget removes a node that the source refuses.
func (d *descriptions) forget(node key.NodePublic) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.nodes, node)
}

// of implements [Source].
func (d *descriptions) of(node key.NodePublic) (Description, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	description, ok := d.nodes[node]
	return description, ok
}
