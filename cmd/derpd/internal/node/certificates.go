package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"time"

	"derpd/certs"
	"derpd/cmd/derpd/internal/config"
	"derpd/cmd/derpd/internal/host"
)

// errNoName prevents a certificate that no client would accept, and that would
// be kept for ten years.
var errNoName = errors.New("DERP_DOMAIN: no address of this machine was found, and the pinned certificate must name one; set DERP_DOMAIN or DERP_PUBLIC_IPV4, or start again when the network is up")

// certificates returns the certificate manager of the configured mode. It is nil
// in mode off.
func (n *Node) certificates(ctx context.Context) (certs.Manager, error) {
	c := n.config.Certificate
	switch c.Mode {
	case config.ModeManual:
		manual := c.Manual
		manual.Log, manual.Changed = n.log, n.certNameChanged
		m, err := certs.LoadManual(manual)
		if err != nil {
			return nil, fmt.Errorf("DERP_CERT_FILE: %w", err)
		}
		return m, nil
	case config.ModePinned:
		m, err := n.pinned(ctx)
		if err != nil {
			return nil, fmt.Errorf("DERP_CERT_DIR: %w", err)
		}
		return m, nil
	case config.ModeLetsEncrypt:
		acme := c.ACME
		acme.ListenHost, _, _ = net.SplitHostPort(n.config.Listen.HTTPS)
		ports := n.listeners.ports()
		if c.Challenges.TLSALPN {
			acme.TLSPort = ports.https
		}
		if c.Challenges.HTTP {
			acme.HTTPPort = ports.http
		}
		acme.Log = n.log
		return certs.NewACME(acme), nil
	}
	return nil, nil
}

// pinned loads the pinned certificate. The first start makes it, with every
// address known by then; only that start waits for the public address.
func (n *Node) pinned(ctx context.Context) (certs.Manager, error) {
	pinned := n.config.Certificate.Pinned
	pinned.Log, pinned.Changed = n.log, n.certNameChanged
	m, err := certs.LoadPinned(pinned)
	if !errors.Is(err, fs.ErrNotExist) {
		return m, err
	}
	n.findAddress(ctx)
	if pinned.Names = n.config.Names(n.found.List()...); len(pinned.Names) == 0 {
		return nil, errNoName
	}
	return certs.LoadOrCreatePinned(pinned)
}

// Pin returns the hash of the self-signed certificate, as the map has it, and the
// certificate's last day.
func Pin(c *config.Config) (hash string, until time.Time, err error) {
	load := loadPinned
	if c.Certificate.Mode == config.ModeManual {
		load = loadManual
	}
	m, err := load(c)
	if err != nil {
		return "", time.Time{}, err
	}
	status := m.Status()
	if status.Pin == "" {
		return "", time.Time{}, fmt.Errorf("%s is the certificate of an authority, so the map has no pin", c.Certificate.Manual.CertFile)
	}
	return status.Pin, status.Leaf.NotAfter, nil
}

// RotatePinned replaces the pinned certificate. A running relay serves the new
// one at once. Clients need the new map.
func RotatePinned(ctx context.Context, c *config.Config, now time.Time) error {
	pinned := c.Certificate.Pinned
	if pinned.Names = c.Names(publicAddresses(ctx, c).List()...); len(pinned.Names) == 0 {
		return errNoName
	}
	return certs.RotatePinned(pinned, now)
}

// publicAddresses finds the addresses that neither DERP_DOMAIN nor
// DERP_PUBLIC_IPV4 and DERP_PUBLIC_IPV6 give.
func publicAddresses(ctx context.Context, c *config.Config) host.Addresses {
	if !c.NeedsDiscovery() {
		return host.Addresses{}
	}
	return host.PublicAddresses(ctx, c.Region.Discovery)
}
