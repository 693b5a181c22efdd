package admin

import (
	"net/http"

	"tailscale.com/tsweb/varz"
)

// serveMetrics writes Prometheus' text format. varz takes the type of a metric
// from a prefix of its name (gauge_, counter_), which it does not print.
func (c Config) serveMetrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	for _, v := range c.Metrics() {
		varz.WritePrometheusExpvar(w, v)
	}
}
