package node

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"strings"
	"time"

	"derpd/cmd/derpd/internal/config"
	"derpd/healthz"
	"derpd/internal/issuer"
	"derpd/relay/admit"
	"derpd/relay/stun"
)

// checks are the parts of the health report, in the order of causes: the first
// failure explains the later ones. A new check is one function and one line here.
func (n *Node) checks() []healthz.Check {
	list := []healthz.Check{{Name: "listeners", Run: n.checkListeners}}
	if n.certs != nil {
		list = append(list, healthz.Check{Name: "certificate", Run: n.checkCertificate})
	}
	list = append(list, healthz.Check{Name: "derp", Run: n.checkDERP})
	if n.stun != nil {
		list = append(list, healthz.Check{Name: "stun", Run: n.checkSTUN})
	}
	list = append(list, healthz.Check{Name: "admission", Run: n.checkAdmission})
	if n.config.NodeLimits.May() {
		list = append(list, healthz.Check{Name: "limits", Run: n.checkNodeLimits})
	}
	if n.config.Meshed() {
		list = append(list, healthz.Check{Name: "mesh", Run: n.checkMesh})
	}
	list = append(list,
		healthz.Check{Name: "connections", Run: n.checkConnections},
		healthz.Check{Name: "packets", Run: n.checkPackets},
		healthz.Check{Name: "proxies", Run: n.checkProxies},
		healthz.Check{Name: "files", Run: n.checkFiles})
	if n.updates != nil {
		list = append(list, healthz.Check{Name: "updates", Run: n.updates.check})
	}
	return list
}

// checkListeners connects to each public TCP listener. STUN and DERP have checks
// of their own.
func (n *Node) checkListeners(ctx context.Context) healthz.Result {
	var up []string
	for _, l := range []struct {
		name string
		ln   net.Listener
	}{{"https", n.listeners.https}, {"http", n.listeners.http}} {
		if l.ln == nil {
			continue
		}
		conn, err := n.relay.DialSelf(ctx, loopback(l.ln.Addr()))
		if err != nil {
			return healthz.Failf("%s on %s: %v", l.name, l.ln.Addr(), err)
		}
		_ = conn.Close()
		up = append(up, fmt.Sprintf("%s %s", l.name, l.ln.Addr()))
	}
	return healthz.Okf("%s", strings.Join(up, ", "))
}

const day = 24 * time.Hour

// renewal is the fix for an old certificate, by mode. certmagic renews when a
// third of the lifetime is left, so an old certificate of an authority is overdue.
var renewal = map[string]string{
	config.ModeManual:      "renew the files",
	config.ModePinned:      "make a new one with `derpd pin --rotate` and paste the new map",
	config.ModeLetsEncrypt: "its renewal is overdue; the log has the cause",
}

// isOld reports whether less than a quarter of a certificate's lifetime is left, and
// less than 30 days.
func isOld(leaf *x509.Certificate, left time.Duration) bool {
	return left < min(leaf.NotAfter.Sub(leaf.NotBefore)/4, 30*day)
}

// remaining prints a time in the largest unit of which there are at least two.
func remaining(left time.Duration) string {
	switch {
	case left >= 2*day:
		return fmt.Sprintf("%d days left", left/day)
	case left >= 2*time.Hour:
		return fmt.Sprintf("%d hours left", left/time.Hour)
	case left >= 2*time.Minute:
		return fmt.Sprintf("%d minutes left", left/time.Minute)
	}
	return fmt.Sprintf("%d seconds left", left/time.Second)
}

func (n *Node) checkCertificate(context.Context) healthz.Result {
	mode := n.config.Certificate.Mode
	s := n.certs.Status()
	if s.Leaf == nil {
		return healthz.Failf("waiting for %s: %v", strings.Join(n.config.Domains, ", "), s.Err)
	}
	verdict := n.verdict()
	left := time.Until(s.Leaf.NotAfter)
	line := fmt.Sprintf("%s, %s, %s", mode, strings.Join(issuer.Names(s.Leaf), " "), remaining(left))
	switch {
	case verdict.Level == healthz.Fail && s.Err != nil: // why there is no better one
		return healthz.Failf("%s; %v", verdict, s.Err)
	case verdict.Level == healthz.Fail:
		return healthz.Failf("%s", verdict)
	}
	parts := []string{line}
	if verdict.Level == healthz.Warn {
		parts = append(parts, verdict.String())
	}
	if warning := n.mapCert.warning(time.Now()); warning != "" {
		parts = append(parts, warning)
	}
	if s.Err != nil {
		parts = append(parts, s.Err.Error())
	} else if isOld(s.Leaf, left) {
		parts = append(parts, renewal[mode])
	}
	if len(parts) > 1 {
		return healthz.Warnf("%s", strings.Join(parts, "; "))
	}
	return healthz.Okf("%s", line)
}

// checkDERP reports the state of the self-check, which runs all the time.
func (n *Node) checkDERP(context.Context) healthz.Result {
	if err := n.notServing(); err != nil {
		return healthz.Failf("through %s: %v", n.listeners.https.Addr(), err)
	}
	switch state := n.selfCheck.State(); {
	case state.Overload != nil:
		return healthz.Warnf("overloaded, but clients that are connected are served: %v", state.Overload)
	case state.Err != nil:
		return healthz.Warnf("the last check took too long, and is repeated: %v", state.Err)
	default:
		return healthz.Okf("a packet between two clients in %s", state.Took.Round(100*time.Microsecond))
	}
}

// refusedWarning is how long health reports a refused STUN request. Clients ask
// about twice a minute, so the warning ends soon after the cause is fixed.
const refusedWarning = time.Hour

func (n *Node) checkSTUN(ctx context.Context) healthz.Result {
	if !n.stun.Open() {
		return healthz.Failf("closed, since the relay cannot serve clients: %v", n.notServing())
	}
	took, err := healthz.STUN(ctx, loopback(n.listeners.stun.LocalAddr()))
	if err != nil {
		return healthz.Failf("round trip through %s: %v", n.listeners.stun.LocalAddr(), err)
	}
	line := fmt.Sprintf("round trip in %s", took.Round(10*time.Microsecond))
	if refused, last := n.stun.Refused(); refused > 0 && time.Since(last) < refusedWarning {
		return healthz.Warnf("%s; %d requests refused, the last one %s ago: %v", line, refused, age(last), stun.ErrGateway)
	}
	return healthz.Okf("%s", line)
}

// limitedWarning is how long health reports a node that was refused without a question.
const limitedWarning = 10 * time.Minute

func (n *Node) checkAdmission(context.Context) healthz.Result {
	gate := n.gate.Load()
	if gate == nil {
		return healthz.Warnf("open: anybody who finds this relay can use it; %s", config.HowToClose())
	}
	var good, bad []string
	for _, s := range gate.States() {
		switch {
		case s.Err != nil && s.AsOf.IsZero():
			bad = append(bad, fmt.Sprintf("%s: %v", s.Source, s.Err))
		case s.Err != nil:
			bad = append(bad, fmt.Sprintf("%s: %v (its last answer is %s old)", s.Source, s.Err, age(s.AsOf)))
		case s.Problem != nil:
			bad = append(bad, fmt.Sprintf("%s: %v", s.Source, s.Problem))
		case s.AsOf.IsZero():
			good = append(good, s.Source+", no answer yet")
		default:
			good = append(good, fmt.Sprintf("%s, as of %s ago", s.Source, age(s.AsOf)))
		}
	}
	counts := gate.Counts()
	done := fmt.Sprintf("admitted %d, refused %d, kept by grace %d, disconnected %d",
		counts.Admitted, counts.Refused+counts.Unavailable+counts.Limited, counts.Kept, counts.Disconnected)
	if last := gate.LastLimited(); time.Since(last) < limitedWarning {
		done += fmt.Sprintf("; %d attempts to connect were refused without a question, the last one %s ago, because many unknown nodes connect, and the sources are asked about %d of them a second; "+
			"nodes that were admitted before are not affected", counts.Limited, age(last), admit.QuestionsPerSecond)
		if len(bad) == 0 {
			return healthz.Warnf("%s; %s", strings.Join(good, ", "), done)
		}
	}
	if len(bad) > 0 {
		return healthz.Warnf("%d of %d sources need attention: %s; %s", len(bad), len(bad)+len(good), strings.Join(bad, "; "), done)
	}
	if n.config.Open() {
		return healthz.Warnf("%s; %s; %s", closedLate, strings.Join(good, ", "), done)
	}
	return healthz.Okf("%s; %s", strings.Join(good, ", "), done)
}

// checkMesh never fails: clients of this node would gain nothing if it refused
// them because another node is down.
func (n *Node) checkMesh(context.Context) healthz.Result {
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
		return healthz.Warnf("%d of %d nodes connected; %s", up, all, strings.Join(bad, "; "))
	}
	return healthz.Okf("%d of %d nodes connected", up, all)
}

// checkFiles reports private files that other users of the machine may use.
func (n *Node) checkFiles(context.Context) healthz.Result {
	if exposed := n.config.Exposed(); len(exposed) > 0 {
		return healthz.Warnf("%s", strings.Join(exposed, "; "))
	}
	return healthz.Okf("keys and secrets are private")
}

// age is the time since t, in whole seconds.
func age(t time.Time) time.Duration { return time.Since(t).Round(time.Second) }
