package relay

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/rs/zerolog"
)

// The paths of clients and of everybody else, by method.
func TestRoutes(t *testing.T) {
	r := newRelay(t, Config{Log: zerolog.Nop()})
	handlers := map[string]http.Handler{"public": r.handler(), "plain": RedirectHandler(443)}
	const policy = "default-src 'none'; frame-ancestors 'none'; form-action 'none'; base-uri 'self'; block-all-mixed-content"
	challenge := http.Header{"X-Tailscale-Challenge": {"ts_derp.example.com"}}
	for _, tt := range []struct {
		handler, method, path string
		header                http.Header
		status                int
		want                  map[string]string // header fields; empty: absent
		body                  string
	}{
		{handler: "public", method: "GET", path: "/", status: 200, want: map[string]string{"Content-Security-Policy": "", "X-Content-Type-Options": ""}},
		{handler: "public", method: "HEAD", path: "/", status: 200},
		{handler: "public", method: "GET", path: "/any/path", status: 200},
		{handler: "public", method: "POST", path: "/", status: 405, want: map[string]string{"Allow": "GET, HEAD"}, body: "method not allowed\n"},
		{handler: "public", method: "OPTIONS", path: "/", status: 405, want: map[string]string{"Allow": "GET, HEAD"}, body: "method not allowed\n"},
		{handler: "public", method: "CONNECT", path: "/", status: 405, want: map[string]string{"Allow": "GET, HEAD"}, body: "method not allowed\n"},
		{handler: "public", method: "GET", path: "/robots.txt", status: 200, want: map[string]string{"Content-Security-Policy": ""}, body: "User-agent: *\nDisallow: /\n"},
		{handler: "public", method: "GET", path: "/derp", status: 200},
		{handler: "public", method: "GET", path: "/derp/mesh", status: 200},
		{handler: "public", method: "POST", path: "/derp/mesh", status: 405, body: "method not allowed\n"},
		{handler: "public", method: "GET", path: "/derp/probe", status: 200, want: map[string]string{"Access-Control-Allow-Origin": "*"}},
		{handler: "public", method: "HEAD", path: "/derp/latency-check", status: 200, want: map[string]string{"Access-Control-Allow-Origin": "*"}},
		{handler: "public", method: "GET", path: "/generate_204", header: challenge, status: 204, want: map[string]string{"X-Tailscale-Response": "response ts_derp.example.com"}},
		{
			handler: "public", method: "GET", path: "/bootstrap-dns", status: 200, body: "{}",
			want: map[string]string{"Content-Type": "application/json", "Connection": "close", "Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Strict-Transport-Security": ""},
		},
		{handler: "plain", method: "GET", path: "/generate_204", header: challenge, status: 204, want: map[string]string{"X-Tailscale-Response": "response ts_derp.example.com"}},
		{handler: "plain", method: "HEAD", path: "/a?b=c", status: 302, want: map[string]string{"Location": "https://example.com/a?b=c"}},
		{handler: "plain", method: "POST", path: "/", status: 405, want: map[string]string{"Allow": "GET, HEAD"}, body: "method not allowed\n"},
		{handler: "plain", method: "CONNECT", path: "/", status: 405, body: "method not allowed\n"},
	} {
		req := httptest.NewRequestWithContext(t.Context(), tt.method, tt.path, http.NoBody)
		for field, values := range tt.header {
			req.Header[field] = values
		}
		w := httptest.NewRecorder()
		handlers[tt.handler].ServeHTTP(w, req)
		if w.Code != tt.status || w.Body.String() != tt.body {
			t.Errorf("%s %s %s: %d %q, want %d %q", tt.handler, tt.method, tt.path, w.Code, w.Body, tt.status, tt.body)
		}
		for field, want := range tt.want {
			if got := w.Header().Get(field); got != want {
				t.Errorf("%s %s %s: %s is %q, want %q", tt.handler, tt.method, tt.path, field, got, want)
			}
		}
	}
	// A host that is missing leads nowhere.
	req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody)
	req.Host = ""
	w := httptest.NewRecorder()
	handlers["plain"].ServeHTTP(w, req)
	if w.Code != http.StatusBadRequest {
		t.Errorf("without a host: %d, want 400", w.Code)
	}
}
