package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"

	"tailscale.com/types/key"

	"derpd/cmd/derpd/internal/admin"
	"derpd/cmd/derpd/internal/config"
	"derpd/relay"
	"derpd/relay/admit"
)

// newGate returns the gate of sources.
func (n *Node) newGate(configured []config.Source) (*admit.Gate, error) {
	c := n.config
	var sources []admit.Source
	for _, s := range configured {
		source, err := s.New(n.log)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.Variable, err)
		}
		sources = append(sources, source)
	}
	return admit.NewGate(admit.Config{
		Sources:  sources,
		Grace:    c.Admission.Grace,
		Path:     filepath.Join(c.Storage.DataDir, "admitted.json"),
		Interval: c.Admission.Interval,
		// The relay is built after the gate, and calls the gate.
		MemberAddr: func(addr netip.Addr) bool { return n.relay.Member(addr) },
		Log:        n.log,
	}), nil
}

// runGate runs a gate until ctx ends.
func (n *Node) runGate(ctx context.Context, gate *admit.Gate) error {
	return gate.Run(ctx, admit.Clients{List: n.connected, Disconnect: n.relay.Disconnect})
}

// admit is nil for a relay that stays open.
func (n *Node) admit() relay.AdmitFunc {
	if n.gate.Load() == nil && !n.mayClose() {
		return nil
	}
	return func(ctx context.Context, node key.NodePublic, addr netip.Addr) error {
		gate := n.gate.Load()
		if gate == nil || n.probe.has(node) {
			return nil
		}
		err := gate.Admit(ctx, node, addr)
		switch {
		case admit.IsUnavailable(err):
			return fmt.Errorf("%w: %w", relay.ErrSourceUnavailable, err)
		case errors.Is(err, admit.ErrTooManyForLong):
			return fmt.Errorf("%w: %w", relay.ErrBusy, err)
		case errors.Is(err, admit.ErrTooMany):
			return fmt.Errorf("%w: %w", relay.ErrRetry, err)
		}
		return err
	}
}

// connected are the clients that the gate checks again: all but the self-check's.
func (n *Node) connected() map[key.NodePublic]netip.Addr {
	list := n.relay.Clients()
	maps.DeleteFunc(list, func(node key.NodePublic, _ netip.Addr) bool { return n.probe.has(node) })
	return list
}

// admission answers `derpd admit`.
func (n *Node) admission(ctx context.Context, node key.NodePublic) admin.Admission {
	gate := n.gate.Load()
	if gate == nil {
		a := admin.OpenAdmission()
		a.Limit = n.explainLimit(node)
		return a
	}
	answers, err := gate.AskAll(ctx, node)
	a := admin.NewAdmission(answers, err, n.config.Admission.Grace)
	if a.Admitted {
		a.Limit = n.explainLimit(node)
	}
	return a
}
