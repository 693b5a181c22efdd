package node

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"

	"derpd/relay/derpmap"
)

// formatMap describes the region of the running relay. It waits until the public
// address is known.
func (n *Node) formatMap(ctx context.Context, format string) ([]byte, error) {
	own, notes, err := n.public(ctx)
	if err != nil {
		return nil, err
	}
	nodes := []derpmap.Node{own}
	for _, d := range n.relay.Mesh().Descriptions(ctx) {
		switch {
		case d.Node.HostName == "":
			notes = append(notes, fmt.Sprintf("%s belongs here too, but could not be asked: %v.", d.From, shortNetError(d.Err)),
				"Print the map again (derpd derpmap) when it runs.")
		case d.Node.RegionID != own.RegionID:
			notes = append(notes, fmt.Sprintf("%s says that it is in region %d: give the nodes of DERP_MESH_WITH one DERP_REGION_ID.", d.From, d.Node.RegionID))
		default:
			nodes = append(nodes, d.Node)
		}
	}
	return derpmap.Format(format, derpmap.New(nodes...), notes)
}

// describe is what this node sends to the other nodes of the mesh about itself.
func (n *Node) describe(ctx context.Context) (derpmap.Node, error) {
	node, _, err := n.public(ctx)
	return node, err
}

// public describes this relay as it runs. It waits until the public address is
// known.
func (n *Node) public(ctx context.Context) (derpmap.Node, []string, error) {
	select {
	case <-n.address:
	case <-ctx.Done():
		return derpmap.Node{}, nil, ctx.Err()
	}
	pin := ""
	if n.certs != nil {
		pin = n.certs.Status().Pin
	}
	node, notes := publicNode(n.config, n.listeners.ports(), pin, n.found, n.gate.Load() == nil)
	if n.certs != nil && n.certs.Status().Leaf != nil {
		notes = append(notes, verdictNotes(n.verdict())...)
	}
	return node, append(notes, n.mapCertNotes()...), nil
}

// shortNetError leaves out the addresses of a connection. Messages name the node
// already. It adds the fix for the certificate of an unknown authority.
func shortNetError(err error) error {
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return fmt.Errorf("%w; if the authority is a private one, set DERP_CA_ROOTS to its roots", err)
	}
	if e, ok := errors.AsType[*net.OpError](err); ok && e.Op != "remote error" {
		return e.Err
	}
	return err
}
