package admin

import (
	"cmp"
	"context"
	"errors"
	"expvar"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"tailscale.com/types/key"
)

// A web page cannot ask the admin listener through the operator's browser.
func TestGuard(t *testing.T) {
	server := httptest.NewServer(Handler(Config{
		Host:      "relay.example.com",
		Health:    answer(http.StatusOK, "text/plain", "ok\n"),
		Map:       func(context.Context, string) ([]byte, error) { return []byte("map"), nil },
		Admission: func(context.Context, key.NodePublic) Admission { return Admission{} },
		AcceptPin: func(string) error { return nil },
		Metrics:   func() []expvar.KeyValue { return nil },
	}))
	t.Cleanup(server.Close)
	for _, tt := range []struct {
		host, method, path string
		want               int
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
		{host: "evil.example", path: "/admit?node=" + key.NewNode().Public().String(), want: http.StatusForbidden},
		{host: "localhost", path: "/admit?node=" + key.NewNode().Public().String(), want: http.StatusOK},
		{host: "evil.example", method: http.MethodPost, path: "/pin/accept", want: http.StatusForbidden},

		// Prometheus, Kubernetes and load balancers use names of their own.
		{host: "derpd.monitoring.svc.cluster.local:9090", path: "/metrics", want: http.StatusOK},
		{host: "relay.internal:9090", path: "/livez", want: http.StatusOK},
		{host: "relay.internal", path: "/readyz", want: http.StatusOK},
		{host: "relay.internal", path: "/healthz", want: http.StatusOK},
	} {
		req, err := http.NewRequestWithContext(t.Context(), tt.method, server.URL+cmp.Or(tt.path, "/derpmap"), http.NoBody)
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

// A command sends a Host that every relay accepts. DERP_ADMIN_ADDR of a command in
// another container may be a name with dots, or an IPv6 address with a zone.
func TestHostOfCommands(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", mapType)
		_, _ = io.WriteString(w, r.Host)
	}))
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	_ = server.Listener.Close()
	server.Listener = ln
	server.Start()
	t.Cleanup(server.Close)
	_, port, err := net.SplitHostPort(ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"", "127.0.0.1", "localhost", "::1", "::1%1"} {
		sent, err := Client{Addr: net.JoinHostPort(host, port)}.Map(t.Context(), "json")
		if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" && strings.Contains(host, ":") {
			continue // a machine without IPv6
		}
		if err != nil || !isOurs(string(sent), "") || strings.Contains(string(sent), ".") {
			t.Errorf("%q: the Host is %q, %v", host, sent, err)
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
