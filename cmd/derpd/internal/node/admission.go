package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"

	"derpd/cmd/derpd/internal/admin"
	"derpd/cmd/derpd/internal/config"
	"derpd/relay"
	"derpd/relay/admit"
)

// newGate returns the gate of the configured sources. It is nil for an open
// relay.
func newGate(c *config.Config, log zerolog.Logger) (*admit.Gate, error) {
	if c.Open() {
		return nil, nil
	}
	var sources []admit.Source
	for _, s := range c.Sources {
		source, err := s.New(log)
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
		Log:      log,
	}), nil
}

// admit is nil for an open relay.
func (n *Node) admit() relay.AdmitFunc {
	if n.gate == nil {
		return nil
	}
	return func(ctx context.Context, node key.NodePublic, addr netip.Addr) error {
		if n.probe.has(node) {
			return nil
		}
		err := n.gate.Admit(ctx, node, addr)
		switch {
		case admit.IsUnavailable(err):
			return fmt.Errorf("%w: %w", relay.ErrSourceUnavailable, err)
		case errors.Is(err, admit.ErrTooMany):
			return fmt.Errorf("%w: %w", relay.ErrBusy, err)
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
	if n.gate == nil {
		return admin.OpenAdmission()
	}
	answers, err := n.gate.AskAll(ctx, node)
	return admin.NewAdmission(answers, err, n.config.Admission.Grace)
}
