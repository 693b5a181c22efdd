package node

import (
	"net/http"
	"testing"

	"derpd/internal/testkit"
)

// Variables that the platforms set.
const (
	onFly     = "FLY_APP_NAME=my-derp FLY_REGION=hkg FLY_PUBLIC_IP=2606:4700::bad FLY_PRIVATE_IP=fdaa::3"
	onRailway = "RAILWAY_PROJECT_ID=p PORT=8080 RAILWAY_TCP_PROXY_DOMAIN=a.proxy.rlwy.net RAILWAY_TCP_PROXY_PORT=35432 RAILWAY_TCP_APPLICATION_PORT=8443"
)

// A platform asks for health from outside, by any host name, and learns
// nothing else.
func TestHealthForAPlatform(t *testing.T) {
	n := begin(t, testkit.Environ(t, "DERP_HEALTH_ADDR=127.0.0.1:0"))
	base := "http://" + n.listeners.health.Addr().String()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for path, want := range map[string]response{
		"/readyz":  {status: http.StatusOK, body: "ready\n"},
		"/healthz": {status: http.StatusNotFound, body: "404 page not found\n"},
		"/derpmap": {status: http.StatusNotFound, body: "404 page not found\n"},
		"/metrics": {status: http.StatusNotFound, body: "404 page not found\n"},
		"/":        {status: http.StatusNotFound, body: "404 page not found\n"},
	} {
		if got := do(t, client, http.MethodGet, base+path, nil); got.status != want.status || got.body != want.body {
			t.Errorf("%s: %d %q, want %d %q", path, got.status, got.body, want.status, want.body)
		}
	}
	n.health.Stopping()
	if got := do(t, client, http.MethodGet, base+"/readyz", nil); got.status != http.StatusServiceUnavailable || got.body != "not ready\n" {
		t.Errorf("stopping: %d %q", got.status, got.body)
	}
}
