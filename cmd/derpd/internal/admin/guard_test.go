package admin

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"tailscale.com/types/key"
)

// A web page cannot ask the admin listener through the operator's browser.
func TestGuard(t *testing.T) {
	server := httptest.NewServer(Handler(Config{Host: "relay.example.com", Health: answer(http.StatusOK, "text/plain", "ok\n")}))
	t.Cleanup(server.Close)
	for _, tt := range []struct {
		host, method string
		want         int
	}{
		{host: "", want: http.StatusOK}, // the address that the client dials
		{host: "127.0.0.1", want: http.StatusOK},
		{host: "127.0.0.1:9090", want: http.StatusOK},
		{host: "[::1]:9090", want: http.StatusOK},
		{host: "[::1]", want: http.StatusOK},
		{host: "192.0.2.1:80", want: http.StatusOK},
		{host: "localhost:1", want: http.StatusOK},
		{host: "relay:9090", want: http.StatusOK}, // of a container network
		{host: "Relay.Example.com:9090", want: http.StatusOK},
		{host: "evil.example", want: http.StatusForbidden},
		{host: "evil.example:9090", want: http.StatusForbidden},
		{host: "127.0.0.1.evil.example", want: http.StatusForbidden},
		{host: "localhost.evil.example:9090", want: http.StatusForbidden},
		{host: "relay.example.com.evil.example", want: http.StatusForbidden},
		{host: "evil.example", method: http.MethodPost, want: http.StatusForbidden},
	} {
		req, err := http.NewRequestWithContext(t.Context(), tt.method, server.URL+"/livez", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = tt.host
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != tt.want {
			t.Errorf("%+v: %d", tt, res.StatusCode)
		}
	}
}

// Each question costs one to every source of admission, so they are limited.
func TestAdmissionIsLimited(t *testing.T) {
	asked := 0
	c := running(t, Handler(Config{Health: http.NotFoundHandler(), Admission: func(context.Context, key.NodePublic) Admission {
		asked++
		return Admission{}
	}}))
	path := "/admit?node=" + key.NewNode().Public().String()
	refused := 0
	for range 50 {
		switch status, _, _, err := c.ask(t.Context(), http.MethodGet, path); {
		case err != nil:
			t.Fatal(err)
		case status == http.StatusTooManyRequests:
			refused++
		}
	}
	if _, err := c.Admission(t.Context(), key.NewNode().Public()); err == nil || errors.Is(err, NotDerpdError(c)) {
		t.Errorf("the client beyond the limit: %v", err)
	}
	if asked < questionsBurst || asked > questionsBurst+20 || refused != 50-asked {
		t.Errorf("%d asked and %d refused", asked, refused)
	}
}
