package main

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

func answer(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// TestAnotherServerOnTheAdminAddress runs the commands that ask the running relay
// while another server has DERP_ADMIN_ADDR. Its answers must not pass for a map
// or for an admission.
func TestAnotherServerOnTheAdminAddress(t *testing.T) {
	for name, answer := range map[string]http.HandlerFunc{
		"a page":        answer(http.StatusOK, "<html>It works!</html>"),
		"an empty page": answer(http.StatusOK, ""),
		"not found":     answer(http.StatusNotFound, `{"Admitted":true,"Reason":"a source says yes"}`),
		"a page of text": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			_, _ = io.WriteString(w, "It works!")
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(answer)
			t.Cleanup(server.Close)
			env := testkit.LastOfEach(testkit.Environ(t, "DERP_ADMIN_ADDR="+server.Listener.Addr().String(), "DERP_CERT_MODE=off", "DERP_DOMAIN=derp.example.com"))
			ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
			defer cancel()

			var out, stderr strings.Builder
			err := run(ctx, time.Now(), []string{"derpmap", "--format", "json"}, env, &out, &stderr)
			// The map comes from the configuration, as without a relay,
			// and a message says so.
			if err != nil || !strings.Contains(out.String(), `"HostName": "derp.example.com"`) || !strings.Contains(stderr.String(), "is not a derpd") {
				t.Errorf("derpmap: %v\n%s\n%s", err, out.String(), stderr.String())
			}

			out.Reset()
			err = run(ctx, time.Now(), []string{"healthcheck"}, env, &out, io.Discard)
			notDerpd := "DERP_ADMIN_ADDR: " + server.Listener.Addr().String() +
				" is not a derpd, or is one of another version; set it to the admin address of the running relay"
			if err == nil || err.Error() != notDerpd || out.Len() > 0 {
				t.Errorf("healthcheck: %v\n%s", err, out.String())
			}

			out.Reset()
			err = run(ctx, time.Now(), []string{"admit", key.NewNode().Public().String()}, env, &out, io.Discard)
			if err == nil || err.Error() != notDerpd || out.Len() > 0 {
				t.Errorf("admit: %v\n%s", err, out.String())
			}
		})
	}
}
