package admin

import (
	"net"
	"net/http"
	"net/netip"
)

// orderType is the media type of a request that changes the relay. A page may send it
// to another host only after a preflight request, which no handler answers.
const orderType = "application/vnd.derpd.order"

// refusalType is the media type of the reason why an order is not carried out.
const refusalType = "application/vnd.derpd.refusal"

// RefusedError is the reason why the running relay does not carry out an order.
type RefusedError struct{ Reason string }

// Error implements error.
func (e RefusedError) Error() string { return e.Reason }

// order serves a request that changes the relay. It accepts requests of commands on
// this machine alone:
//
//   - Browsers send Origin with every POST (Fetch standard, section 3.2). No page of a
//     browser is accepted, even if its name leads to this address (DNS rebinding).
//   - DERP_ADMIN_ADDR may be an address that other machines reach, for Prometheus. Other
//     machines may read, and change nothing.
func order(serve http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("Content-Type") != orderType || len(r.Header["Origin"]) > 0 || len(r.Header["Sec-Fetch-Site"]) > 0:
			http.Error(w, "only commands of derpd may change the relay", http.StatusForbidden)
		case !fromThisMachine(r):
			http.Error(w, "only commands on the machine of the relay may change the relay", http.StatusForbidden)
		default:
			serve(w, r)
		}
	}
}

// fromThisMachine reports whether a request comes from loopback, or from the address
// that it was sent to.
func fromThisMachine(r *http.Request) bool {
	remote, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return false
	}
	from := remote.Addr().Unmap()
	local, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return from.IsLoopback() || local != nil && from == local.AddrPort().Addr().Unmap()
}
