package relay

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
)

// readsForwarded reports whether requests may have a client's address in
// X-Forwarded-For.
func (r *Relay) readsForwarded() bool {
	return len(r.config.TrustedProxies) > 0 && !r.config.ProxyProtocol
}

// connKey is the key of the connection in the context of a request.
type connKey struct{}

func withConn(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, conn)
}

// forwarded sets the remote address of requests that come from a trusted proxy
// to the address of the client in X-Forwarded-For. It refuses clients that get no place.
func forwarded(trusted []netip.Prefix, p *places, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		peer, err := netip.ParseAddrPort(r.RemoteAddr)
		if err != nil {
			next.ServeHTTP(w, r)
			return
		}
		if client := forwardedFor(trusted, peer, r.Header.Values("X-Forwarded-For")); client != peer {
			r = r.WithContext(r.Context()) // a copy
			r.RemoteAddr = client.String()
			if conn, ok := r.Context().Value(connKey{}).(net.Conn); ok && !p.identify(conn, client.Addr()) {
				w.Header().Set("Connection", "close") // it has no place now
				http.Error(w, "too many connections", http.StatusServiceUnavailable)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// forwardedFor returns the address of the client behind peer. Each proxy
// appends the address of its peer, so the list is read from the right. The
// first address that is not a trusted proxy is the client. Any address further
// left could be forged. Reading stops at a malformed entry.
func forwardedFor(trusted []netip.Prefix, peer netip.AddrPort, lines []string) netip.AddrPort {
	list := strings.Split(strings.Join(lines, ","), ",")
	for _, entry := range slices.Backward(list) {
		if !contains(trusted, peer.Addr()) {
			break
		}
		previous, ok := parseForwarded(strings.Trim(entry, " \t"))
		if !ok {
			break
		}
		peer = previous
	}
	return peer
}

// parseForwarded reads an address. A missing port is 0. Some proxies put IPv6
// addresses in brackets.
func parseForwarded(entry string) (netip.AddrPort, bool) {
	client, err := netip.ParseAddrPort(entry)
	if err != nil {
		if bare, ok := strings.CutPrefix(entry, "["); ok {
			entry, ok = strings.CutSuffix(bare, "]")
			if !ok {
				return netip.AddrPort{}, false
			}
		}
		addr, err := netip.ParseAddr(entry)
		if err != nil {
			return netip.AddrPort{}, false
		}
		client = netip.AddrPortFrom(addr, 0)
	}
	if client.Addr().Zone() != "" || client.Addr().IsUnspecified() || client.Addr().IsMulticast() {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(client.Addr().Unmap(), client.Port()), true
}
