package main

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"tailscale.com/types/key"

	"derpd/healthz"
)

// probeKeys are the clients of the self-check. They exist in this process only,
// so admitting them lets nobody else in.
type probeKeys struct {
	from, to key.NodePrivate
	public   [2]key.NodePublic // computed once: that costs as much as all else that admission does
}

func newProbeKeys() probeKeys {
	p := probeKeys{from: key.NewNode(), to: key.NewNode()}
	p.public = [2]key.NodePublic{p.from.Public(), p.to.Public()}
	return p
}

func (p probeKeys) has(node key.NodePublic) bool { return slices.Contains(p.public[:], node) }

var errNoCertificate = errors.New("waiting for a certificate")

// newSelfCheck watches the relay through its own listener, and keeps STUN open
// only while that works: clients choose a relay by STUN alone, and would be
// stranded by one that answers and cannot serve. Connected clients are left
// alone.
func (n *node) newSelfCheck() *healthz.SelfCheck {
	ready := sync.OnceFunc(func() { close(n.serving) })
	return healthz.NewSelfCheck(n.probeDERP, func(serving bool, cause error) {
		if n.stun != nil {
			n.stun.SetOpen(serving)
		}
		n.health.Changed()
		switch {
		case !serving:
			n.log.Warn().Err(cause).Str("stun", n.stunState()).Msg("the relay cannot serve clients")
		case n.hasServed():
			n.log.Info().Str("stun", n.stunState()).Msg("the relay serves clients again")
		}
		if serving {
			ready()
		}
	})
}

// hasServed reports whether the relay has ever served.
func (n *node) hasServed() bool {
	select {
	case <-n.serving:
		return true
	default:
		return false
	}
}

// stunState is for the log.
func (n *node) stunState() string {
	switch {
	case n.stun == nil:
		return "off"
	case n.stun.Open():
		return "open"
	}
	return "closed"
}

// notServing is why the relay does not serve; nil when it does.
func (n *node) notServing() error {
	state := n.selfCheck.State()
	switch {
	case n.certs != nil && n.certs.Status().Leaf == nil:
		return errNoCertificate
	case state.Err == nil && !state.Serving:
		return errors.New("it works again, and STUN opens if that lasts")
	}
	return state.Err
}

// runSelfCheck begins when there is a certificate; until then the cause is
// known.
func (n *node) runSelfCheck(ctx context.Context) error {
	if n.certs != nil {
		select {
		case <-n.certs.Ready():
		case <-ctx.Done():
			return nil
		}
	}
	err := n.selfCheck.Run(ctx)
	// After the stop has closed it, the last probe may have opened it.
	if n.stun != nil {
		n.stun.SetOpen(false)
	}
	return err
}

// probeDERP passes a packet through the HTTPS listener.
func (n *node) probeDERP(ctx context.Context) (time.Duration, error) {
	probe := healthz.DERPProbe{
		Host: "localhost",
		Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", loopback(n.listeners.https.Addr()).String())
		},
		From: n.probe.from, To: n.probe.to,
	}
	if n.certs != nil {
		if probe.Leaf = n.certs.Status().Leaf; probe.Leaf == nil {
			return 0, errNoCertificate
		}
		probe.Host = probedName(probe.Leaf, n.config.domains)
	}
	return probe.Run(ctx)
}

// probedName is what the certificate must cover: the name that clients dial, if
// it is one. An address is verified, but not sent (SNI has names only).
func probedName(leaf *x509.Certificate, domains []string) string {
	if len(domains) > 0 && net.ParseIP(domains[0]) == nil {
		return domains[0]
	}
	if len(leaf.DNSNames) > 0 {
		return leaf.DNSNames[0]
	}
	if len(leaf.IPAddresses) > 0 {
		return leaf.IPAddresses[0].String()
	}
	return "localhost" // which it does not cover
}
