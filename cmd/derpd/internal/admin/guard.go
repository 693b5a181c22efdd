package admin

import (
	"net"
	"net/http"
	"net/netip"
	"strings"

	"golang.org/x/time/rate"
)

// questionsPerSecond limits how often a request may ask all sources of admission.
// Tailscale's API and admission URLs have limits of their own. `derpd admit` asks once.
const (
	questionsPerSecond = 2
	questionsBurst     = 10
)

// guard refuses requests of a web page in the operator's browser, whose own name leads
// to 127.0.0.1 (DNS rebinding). [order] refuses requests from forms and scripts.
//
// The Host must be an address, a name without a dot such as localhost or that of a
// container, or the host of DERP_ADMIN_ADDR. No stranger can own one of these. Commands
// send a Host of this kind, whatever the name in their DERP_ADMIN_ADDR.
//
// Health and metrics have no guard: Prometheus and load balancers ask for them by names
// such as derpd.monitoring.svc.cluster.local, and their pages have no keys of nodes.
func guard(own string, next http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !isOurs(r.Host, own) {
			http.Error(w, "the Host of the request may belong to a stranger; use the address of this machine, or localhost", http.StatusForbidden)
			return
		}
		next(w, r)
	})
}

// isOurs reports whether no stranger can own a Host. own is a further name, or empty.
func isOurs(host, own string) bool {
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		name = host // without a port
	}
	if n := len(name); n > 1 && name[0] == '[' && name[n-1] == ']' {
		name = name[1 : n-1]
	}
	_, err = netip.ParseAddr(name)
	return err == nil || name != "" && !strings.Contains(name, ".") || own != "" && strings.EqualFold(name, own)
}

// limited answers 429 beyond [questionsPerSecond].
func limited(next http.HandlerFunc) http.HandlerFunc {
	limit := rate.NewLimiter(questionsPerSecond, questionsBurst)
	return func(w http.ResponseWriter, r *http.Request) {
		if !limit.Allow() {
			w.Header().Set("Retry-After", "1")
			http.Error(w, "too many questions; ask again in a second", http.StatusTooManyRequests)
			return
		}
		next(w, r)
	}
}
