package node

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

// probeKeys are the two clients of the self-check. Their private keys never
// leave this process, so admitting them admits nobody else.
type probeKeys struct {
	from, to key.NodePrivate
	public   [2]key.NodePublic // of from and to; expensive to compute, and needed for every client
}

func newProbeKeys() probeKeys {
	p := probeKeys{from: key.NewNode(), to: key.NewNode()}
	p.public = [2]key.NodePublic{p.from.Public(), p.to.Public()}
	return p
}

func (p probeKeys) has(node key.NodePublic) bool { return slices.Contains(p.public[:], node) }

var errNoCertificate = errors.New("waiting for a certificate")

// newSelfCheck returns the check that passes a packet through the relay's own
// listener. STUN is open only while it succeeds: clients choose a relay by STUN
// alone, and would choose one that cannot serve them. Clients that are connected
// stay connected. An overload closes nothing.
func (n *Node) newSelfCheck() *healthz.SelfCheck {
	ready := sync.OnceFunc(func() { close(n.serving) })
	served, overloaded := false, false // in the log
	return healthz.NewSelfCheck(n.probeDERP, n.newOverload().judge, func(state healthz.State) {
		if n.stun != nil {
			n.stun.SetOpen(state.Serving)
		}
		n.health.Changed()
		if !state.Serving {
			n.log.Warn().Err(state.Err).Str("stun", n.stunState()).Msg("the relay cannot serve clients")
		} else if !served && n.hasServed() {
			n.log.Info().Str("stun", n.stunState()).Msg("the relay serves clients again")
		}
		switch now := state.Overload != nil; {
		case now && !overloaded:
			n.log.Warn().AnErr("cause", state.Overload).Str("stun", n.stunState()).Msg("the relay is overloaded; it serves the clients that are connected")
		case !now && overloaded && state.Serving:
			n.log.Info().Msg("the relay is no longer overloaded")
		}
		served, overloaded = state.Serving, state.Overload != nil
		if state.Serving {
			ready()
		}
	})
}

// hasServed reports whether the self-check has ever succeeded.
func (n *Node) hasServed() bool {
	select {
	case <-n.serving:
		return true
	default:
		return false
	}
}

// stunState is the state of STUN for the log: off, open or closed.
func (n *Node) stunState() string {
	switch {
	case n.stun == nil:
		return "off"
	case n.stun.Open():
		return "open"
	}
	return "closed"
}

// notServing is the reason why the relay cannot serve clients, or nil. A relay that
// serves may have missed a check: that is an overload, or the next checks end serving.
func (n *Node) notServing() error {
	state := n.selfCheck.State()
	switch {
	case n.certs != nil && n.certs.Status().Leaf == nil:
		return errNoCertificate
	case state.Serving && (state.Overload != nil || errors.Is(state.Err, context.DeadlineExceeded)):
		return nil
	case state.Err == nil && !state.Serving:
		return errors.New("the last check succeeded; STUN opens again after one more success")
	}
	return state.Err
}

// runSelfCheck waits for a certificate, and then checks until ctx ends.
func (n *Node) runSelfCheck(ctx context.Context) error {
	if n.certs != nil {
		select {
		case <-n.certs.Ready():
		case <-ctx.Done():
			return nil
		}
	}
	err := n.selfCheck.Run(ctx)
	// The last check may have opened STUN after the stop closed it.
	if n.stun != nil {
		n.stun.SetOpen(false)
	}
	return err
}

// probeDERP passes a packet through the HTTPS listener.
func (n *Node) probeDERP(ctx context.Context) (time.Duration, error) {
	probe := healthz.DERPProbe{
		Host: "localhost",
		Dial: func(ctx context.Context) (net.Conn, error) {
			return n.relay.DialSelf(ctx, loopback(n.listeners.https.Addr()))
		},
		From: n.probe.from, To: n.probe.to,
	}
	if n.certs != nil {
		s := n.certs.Status()
		if s.Leaf == nil {
			return 0, errNoCertificate
		}
		probe.Leaf, probe.CertName = s.Leaf, s.Pin
		probe.Host = probedName(s.Leaf, n.config.Domains, s.Pin != "")
		probe.Judge = func(sent []*x509.Certificate) healthz.Verdict {
			// A certificate that was replaced meanwhile does not belong to this
			// pin. The next probe judges it.
			if !s.Leaf.Equal(n.certs.Status().Leaf) {
				return healthz.Verdict{}
			}
			return n.judgeSent(sent, s.Pin)
		}
	}
	return probe.Run(ctx)
}

// probedName is the name that clients dial. Clients that dial an address send no
// name, and verify none: the result is then an address of the certificate, which
// crypto/tls verifies without a pin. A name of the certificate is the last resort.
func probedName(leaf *x509.Certificate, domains []string, pinned bool) string {
	if len(domains) > 0 && net.ParseIP(domains[0]) == nil {
		return domains[0]
	}
	if !pinned && len(leaf.IPAddresses) > 0 {
		return leaf.IPAddresses[0].String()
	}
	if !pinned && len(leaf.DNSNames) > 0 {
		return leaf.DNSNames[0]
	}
	return "127.0.0.1"
}
