package node

import (
	"crypto/x509"
	"sync"
	"time"

	"derpd/cmd/derpd/internal/config"
	"derpd/healthz"
)

// eyes judges the relay's certificate as clients do, and logs when the verdict
// changes.
type eyes struct {
	judgements healthz.Judgements
	roots      func() *x509.CertPool // of this machine; called when a chain is judged

	mu     sync.Mutex
	logged string // the last verdict in the log, empty for a good one; guarded by mu
}

func newEyes(roots *x509.CertPool) *eyes {
	if roots != nil {
		return &eyes{roots: func() *x509.CertPool { return roots }}
	}
	return &eyes{roots: systemRoots}
}

// systemRoots are the roots of this machine, or an empty pool.
func systemRoots() *x509.CertPool {
	if roots, err := x509.SystemCertPool(); err == nil {
		return roots
	}
	return x509.NewCertPool()
}

// clients is what clients verify the certificate by. pin is the CertName of the map.
func clients(c *config.Config, pin string) healthz.Clients {
	verify := healthz.Clients{CertName: pin, Private: c.Roots.Pool, PrivateName: c.Roots.Variable}
	if len(c.Domains) > 0 {
		verify.HostName = c.Domains[0]
	}
	return verify
}

// judge returns the verdict on certificates. pin is the CertName of the map.
func (n *Node) judge(sent []*x509.Certificate, pin string) healthz.Verdict {
	return n.eyes.judgements.Of(clients(n.config, pin), n.eyes.roots, sent, time.Now())
}

// judgeSent judges the certificates that the self-check has received. A verdict that
// differs from the last one is logged, and ends the use of the last health report.
func (n *Node) judgeSent(sent []*x509.Certificate, pin string) healthz.Verdict {
	v := n.judge(sent, pin)
	n.eyes.mu.Lock()
	defer n.eyes.mu.Unlock()
	if v.String() == n.eyes.logged {
		return v
	}
	n.eyes.logged = v.String()
	switch v.Level {
	case healthz.Fail:
		n.log.Warn().Str("cause", v.Cause).Str("fix", v.Fix).Msg("clients refuse the certificate")
	case healthz.Warn:
		n.log.Warn().Str("cause", v.Cause).Str("fix", v.Fix).Msg("some clients may refuse the certificate")
	default:
		n.log.Info().Msg("clients accept the certificate")
	}
	n.health.Changed()
	return v
}

// verdict judges the certificate in use, which the next client gets.
func (n *Node) verdict() healthz.Verdict {
	s := n.certs.Status()
	return n.judge(parseChain(s.Chain), s.Pin)
}

// parseChain leaves out what is no certificate: crypto/x509 of clients refuses it, and
// the verdict then names what is missing.
func parseChain(ders [][]byte) []*x509.Certificate {
	chain := make([]*x509.Certificate, 0, len(ders))
	for _, der := range ders {
		if c, err := x509.ParseCertificate(der); err == nil {
			chain = append(chain, c)
		}
	}
	return chain
}

// verdictNotes are the notes of the map about a certificate that some clients may
// refuse.
func verdictNotes(v healthz.Verdict) []string {
	if v.Level == healthz.OK {
		return nil
	}
	return []string{"The certificate: " + v.Cause + ".", "To correct it: " + v.Fix + "."}
}
