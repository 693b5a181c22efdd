// Package admin is both ends of the admin listener, which is for the operator:
//
//   - admin.go, admission.go, pin.go and metrics.go are the handlers of a running
//     relay; guard.go refuses requests of web pages, and orders.go protects handlers
//     that change something
//   - client.go is the client by which commands such as `derpd admit` ask it
//
// The admin listener is apart from the public listener, and serves no clients.
package admin

import (
	"context"
	"encoding/json"
	"expvar"
	"net/http"

	"tailscale.com/types/key"
)

// mapType is the media type of a map on the admin listener. The client uses it
// to recognise a derpd.
const mapType = "application/vnd.derpd.derpmap"

// Config is the source of what the handlers serve.
type Config struct {
	// Host is the host of the admin listener's address; it may be empty.
	Host string

	// Health serves /livez, /readyz and /healthz.
	Health http.Handler

	// Map returns the map in one of derpmap.Formats. An error is a client's
	// fault: an unknown format.
	Map func(ctx context.Context, format string) ([]byte, error)

	// Admission returns what the sources of admission say about a node.
	Admission func(ctx context.Context, node key.NodePublic) Admission

	// AcceptPin serves the certificate that waits, which clients need a new map
	// for; see certs.Manager.
	AcceptPin func(hash string) error

	// Metrics returns the current metrics.
	Metrics func() []expvar.KeyValue
}

// Handler serves the admin listener.
func Handler(c Config) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", c.Health)
	mux.HandleFunc("GET /metrics", c.serveMetrics)
	mux.Handle("GET /derpmap", guard(c.Host, c.serveMap))
	mux.Handle("GET /admit", guard(c.Host, limited(c.serveAdmission)))
	mux.Handle("POST /pin/accept", guard(c.Host, order(c.servePinAccept)))
	return mux
}

// serveMap answers `derpd derpmap`.
func (c Config) serveMap(w http.ResponseWriter, r *http.Request) {
	out, err := c.Map(r.Context(), r.FormValue("format"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", mapType)
	_, _ = w.Write(out)
}

// serveAdmission answers `derpd admit`.
func (c Config) serveAdmission(w http.ResponseWriter, r *http.Request) {
	var node key.NodePublic
	if err := node.UnmarshalText([]byte(r.FormValue("node"))); err != nil || node.IsZero() {
		http.Error(w, "want node=nodekey:…", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", admissionType)
	_ = json.NewEncoder(w).Encode(c.Admission(r.Context(), node))
}
