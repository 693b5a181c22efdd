package relay

import (
	"net"
	"net/http"
	"strconv"
	"strings"

	"tailscale.com/derp/derpserver"
)

// handler returns the handler of the public listener.
func (r *Relay) handler() http.Handler {
	mux := http.NewServeMux()
	home := readOnly(r.config.Home)
	mux.Handle("/derp", r.upgraded(r.webSockets(r.sessions.handler(derpserver.Handler(r.server))), home))
	// Old and new clients request different paths.
	mux.HandleFunc("/derp/probe", derpserver.ProbeHandler)
	mux.HandleFunc("/derp/latency-check", derpserver.ProbeHandler)
	mux.HandleFunc("/generate_204", derpserver.ServeNoContent)
	mux.Handle("/bootstrap-dns", browserHeaders(r.config.BootstrapDNS))
	mux.HandleFunc("/robots.txt", serveRobots)
	mux.Handle("/", home)
	mux.Handle(meshPath, r.mesh.serveNode(home))
	handler := closing(mux)
	if r.readsForwarded() {
		handler = forwarded(r.config.TrustedProxies, r.places, handler)
	}
	return handler
}

// maxProbes is the number of probes of one connection. Without it a few connections could
// take all processors, and no limit of connections would apply.
const maxProbes = 10

// closing closes the connection after each response, except after the probes that clients
// repeat. An idle connection would keep its place.
func closing(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		keep := false
		switch req.URL.Path {
		case "/derp/probe", "/derp/latency-check", "/generate_204":
			keep = mayProbeAgain(req)
		}
		if !keep {
			w.Header().Set("Connection", "close")
		}
		next.ServeHTTP(w, req)
	})
}

// mayProbeAgain counts a probe of a connection.
func mayProbeAgain(req *http.Request) bool {
	conn, _ := req.Context().Value(connKey{}).(net.Conn)
	c := socketOf(conn)
	if c == nil {
		return true
	}
	c.probes++
	return c.probes < maxProbes
}

// upgraded passes requests with an upgrade to DERP or WebSocket to derp, and all
// others to home, as requests of an unknown path. A proxy has removed the
// upgrade from a client's request without one.
func (r *Relay) upgraded(derp, home http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		switch strings.ToLower(req.Header.Get("Upgrade")) {
		case "derp", "websocket":
			derp.ServeHTTP(w, req)
		default:
			r.misdirected.note(NoUpgrade, isDERP(req) && isProxied(req), req.RemoteAddr)
			home.ServeHTTP(w, req)
		}
	})
}

// withoutDERP wraps the handler of the plain HTTP listener. A proxy that sends DERP
// there has the wrong port.
func (r *Relay) withoutDERP(next http.Handler) http.Handler {
	return closing(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/derp" {
			r.misdirected.note(DERPOnPlainPort, isDERP(req), req.RemoteAddr)
		}
		next.ServeHTTP(w, req)
	}))
}

// RedirectHandler returns the handler of the plain HTTP listener: the captive
// portal check, and a redirect to HTTPS on the given public port.
func RedirectHandler(httpsPort int) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/generate_204", derpserver.ServeNoContent)
	mux.Handle("/", readOnly(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = strings.Trim(r.Host, "[]") // without a port
		}
		if host == "" {
			http.Error(w, "missing Host", http.StatusBadRequest)
			return
		}
		// The client itself sends the host, so no third party can choose the
		// target of the redirect.
		target := *r.URL
		target.Scheme = "https"
		target.Host = strings.TrimSuffix(net.JoinHostPort(host, strconv.Itoa(httpsPort)), ":443")
		http.Redirect(w, r, target.String(), http.StatusFound)
	})))
	return mux
}

func serveRobots(w http.ResponseWriter, _ *http.Request) {
	_, _ = w.Write([]byte("User-agent: *\nDisallow: /\n"))
}

// readOnly refuses all methods but GET and HEAD. Scanners for open proxies send
// CONNECT, for example.
func readOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// browserHeaders sets the headers of upstream's tsweb.AddBrowserHeaders, without
// Strict-Transport-Security: it would bind every other service under the
// operator's domain. The home page and robots.txt lack these headers, because
// search engines for hosts find every derper by them.
func browserHeaders(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'; form-action 'none'; base-uri 'self'; block-all-mixed-content")
		h.Set("X-Content-Type-Options", "nosniff")
		next.ServeHTTP(w, r)
	})
}
