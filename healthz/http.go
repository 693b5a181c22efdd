package healthz

import (
	"encoding/json"
	"net/http"
)

// Handler serves the full report, for the admin listener:
//
//   - /livez returns 200 while the process runs.
//   - /readyz returns 200 or 503, with the first cause and a line for each check.
//   - /healthz returns the same as JSON.
func (h *Health) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("ok\n"))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		report := h.Report(r.Context())
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(status(report))
		_, _ = w.Write([]byte(report.String()))
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		report := h.Report(r.Context())
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status(report))
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		_ = enc.Encode(report)
	})
	return mux
}

// StatusHandler serves /readyz with "ready" or "not ready" alone, for strangers.
// The results name addresses and servers.
func (h *Health) StatusHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		report := h.Report(r.Context())
		w.WriteHeader(status(report))
		if report.Ready {
			_, _ = w.Write([]byte("ready\n"))
		} else {
			_, _ = w.Write([]byte("not ready\n"))
		}
	})
	return mux
}

// status is the status code of a report.
func status(r Report) int {
	if r.Ready {
		return http.StatusOK
	}
	return http.StatusServiceUnavailable
}
