package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	tskey "tailscale.com/types/key"

	"derpd/internal/testkit"
)

// TestTokenInAPath asserts that a token in the path of an admission URL is shown nowhere,
// whether the URL answers or not.
func TestTokenInAPath(t *testing.T) {
	const token = "k5ecfe75ecfe71"
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "no such hook: "+r.URL.Path+" client_secret=5ecfe7", http.StatusNotFound)
	}))
	t.Cleanup(server.Close)
	for name, target := range map[string]string{"answers": server.URL, "refuses": "http://127.0.0.1:1"} {
		t.Run(name, func(t *testing.T) {
			env := testkit.Environ(t, "DERP_VERIFY_CLIENT_URL="+target+"/hooks/"+token+"/verify")
			p := startProgram(t, env)
			testkit.Until(t, "the source is unavailable", func() bool { return len(p.logged(t, "admission source unavailable")) == 1 })
			shown := p.page(t, "/admit?node="+tskey.NewNode().Public().String())
			for _, path := range []string{"/readyz", "/healthz", "/metrics", "/derpmap?format=json"} {
				shown += p.page(t, path)
			}
			effective, _, code := execute(t, env, "env")
			if code != 0 || !strings.Contains(effective, target+"/hooks/…/verify") || !strings.Contains(shown, "/hooks/…/verify") {
				t.Errorf("env: %d\n%s\n%s", code, effective, shown)
			}
			if all := shown + effective + p.stderr.String() + p.stdout.String(); strings.Contains(all, "5ecfe7") {
				t.Errorf("the token is shown:\n%s", all)
			}
		})
	}
}
