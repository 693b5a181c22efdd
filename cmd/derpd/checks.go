package main

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"derpd/healthz"
	"derpd/relay/stun"
)

// checks are the parts of health, in the order of causes.
func (n *node) checks() []healthz.Check {
	list := []healthz.Check{{Name: "listeners", Run: n.checkListeners}}
	if n.certs != nil {
		list = append(list, healthz.Check{Name: "certificate", Run: n.checkCertificate})
	}
	list = append(list, healthz.Check{Name: "derp", Run: n.checkDERP})
	if n.stun != nil {
		list = append(list, healthz.Check{Name: "stun", Run: n.checkSTUN})
	}
	list = append(list, healthz.Check{Name: "admission", Run: n.checkAdmission})
	if n.config.meshed() {
		list = append(list, healthz.Check{Name: "mesh", Run: n.checkMesh})
	}
	return list
}

// checkListeners connects to each TCP listener; STUN and DERP have checks of
// their own.
func (n *node) checkListeners(ctx context.Context) healthz.Result {
	var up []string
	for _, l := range []struct {
		name string
		ln   net.Listener
	}{{"https", n.listeners.https}, {"http", n.listeners.http}} {
		if l.ln == nil {
			continue
		}
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", loopback(l.ln.Addr()).String())
		if err != nil {
			return healthz.Failf("%s on %s: %v", l.name, l.ln.Addr(), err)
		}
		_ = conn.Close()
		up = append(up, fmt.Sprintf("%s %s", l.name, l.ln.Addr()))
	}
	return healthz.Okf("%s", strings.Join(up, ", "))
}

const day = 24 * time.Hour

// expiryWarning is when health begins to mention the end of a certificate that
// nothing here renews. A new pinned one needs every client's map changed.
var expiryWarning = map[string]time.Duration{modeManual: 14 * day, modePinned: 90 * day}

func (n *node) checkCertificate(context.Context) healthz.Result {
	s := n.certs.Status()
	if s.Leaf == nil {
		return healthz.Failf("waiting for %s: %v", strings.Join(n.config.domains, ", "), s.Err)
	}
	names := slices.Clone(s.Leaf.DNSNames)
	for _, ip := range s.Leaf.IPAddresses {
		names = append(names, ip.String())
	}
	left := time.Until(s.Leaf.NotAfter)
	line := fmt.Sprintf("%s, %s, %d days left", n.config.mode, strings.Join(names, " "), int(left/day))
	switch {
	case left <= 0:
		return healthz.Failf("%s expired on %s", strings.Join(names, " "), s.Leaf.NotAfter.Format(time.DateOnly))
	case s.Err != nil:
		return healthz.Warnf("%s; %v", line, s.Err)
	case left < expiryWarning[n.config.mode] && n.config.mode == modeManual:
		return healthz.Warnf("%s; renew the files", line)
	case left < expiryWarning[n.config.mode]:
		return healthz.Warnf("%s; make a new one with `derpd pin --rotate` and paste the new map", line)
	}
	return healthz.Okf("%s", line)
}

// checkDERP tells of the self-check, which goes on all the time.
func (n *node) checkDERP(context.Context) healthz.Result {
	if err := n.notServing(); err != nil {
		return healthz.Failf("through %s: %v", n.listeners.https.Addr(), err)
	}
	return healthz.Okf("a packet between two clients in %s", n.selfCheck.State().Took.Round(100*time.Microsecond))
}

// refusedWarning is for how long health tells of a refused request. Clients ask
// every half a minute or so; once the way for them is mended, this is over.
const refusedWarning = time.Hour

func (n *node) checkSTUN(ctx context.Context) healthz.Result {
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

// toClose are the ways to close an open relay, in the order of the README.
const toClose = "to close it, set DERP_TAILNET_OAUTH_CLIENT_ID, DERP_VERIFY_CLIENTS=true, DERP_VERIFY_CLIENT_URL or DERP_ALLOW_KEYS"

func (n *node) checkAdmission(context.Context) healthz.Result {
	if n.gate == nil {
		return healthz.Warnf("open: anybody who finds this relay can use it; %s", toClose)
	}
	var good, bad []string
	for _, s := range n.gate.States() {
		switch {
		case s.Err != nil && s.AsOf.IsZero():
			bad = append(bad, fmt.Sprintf("%s: %v", s.Source, s.Err))
		case s.Err != nil:
			bad = append(bad, fmt.Sprintf("%s: %v (it last could %s ago)", s.Source, s.Err, age(s.AsOf)))
		case s.Problem != nil:
			bad = append(bad, fmt.Sprintf("%s: %v", s.Source, s.Problem))
		case s.AsOf.IsZero():
			good = append(good, s.Source+", not asked yet")
		default:
			good = append(good, fmt.Sprintf("%s, as of %s ago", s.Source, age(s.AsOf)))
		}
	}
	counts := n.gate.Counts()
	done := fmt.Sprintf("admitted %d, refused %d, kept by grace %d, disconnected %d",
		counts.Admitted, counts.Refused+counts.Unavailable, counts.Kept, counts.Disconnected)
	if len(bad) > 0 {
		return healthz.Warnf("%d of %d sources need attention: %s; %s", len(bad), len(bad)+len(good), strings.Join(bad, "; "), done)
	}
	return healthz.Okf("%s; %s", strings.Join(good, ", "), done)
}

// age is how long ago t was, for people.
func age(t time.Time) time.Duration { return time.Since(t).Round(time.Second) }
