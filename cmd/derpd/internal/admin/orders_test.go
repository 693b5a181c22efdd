package admin

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// A command orders the relay to accept a certificate, and prints the answer.
func TestAcceptPin(t *testing.T) {
	var accepted []string
	refuse := errors.New("no certificate waits")
	c := running(t, Handler(Config{
		Health: http.NotFoundHandler(),
		Map: func(_ context.Context, format string) ([]byte, error) {
			if format != "json" {
				return nil, errors.New("want json")
			}
			return []byte("the new map"), nil
		},
		AcceptPin: func(hash string) error {
			if hash == "none" {
				return refuse
			}
			accepted = append(accepted, hash)
			return nil
		},
	}))
	ctx := t.Context()
	if out, err := c.AcceptPin(ctx, "a b&c", "json"); string(out) != "the new map" || err != nil || len(accepted) != 1 || accepted[0] != "a b&c" {
		t.Errorf("%q, %v, accepted %q", out, err, accepted)
	}
	if out, err := c.AcceptPin(ctx, "none", "json"); !errors.Is(err, RefusedError{refuse.Error()}) || out != nil {
		t.Errorf("%q, %v; want %v", out, err, refuse)
	}
	if _, err := c.AcceptPin(ctx, "", "xml"); !errors.Is(err, RefusedError{"want json"}) {
		t.Errorf("an unknown format: %v", err)
	}
	if len(accepted) != 1 {
		t.Errorf("accepted %q, want one", accepted)
	}
}

// Pages in a browser and other machines give no orders.
func TestOrdersOfCommandsAlone(t *testing.T) {
	var orders int
	handler := order(func(http.ResponseWriter, *http.Request) { orders++ })
	for _, tt := range []struct {
		name, remote, local string
		header              http.Header
		want                int
	}{
		{"a command", "127.0.0.1:1", "127.0.0.1:9090", http.Header{"Content-Type": {orderType}}, http.StatusOK},
		{"a command, by IPv6", "[::1]:1", "[::1]:9090", http.Header{"Content-Type": {orderType}}, http.StatusOK},
		{"a command, by the machine's address", "10.0.0.5:1", "10.0.0.5:9090", http.Header{"Content-Type": {orderType}}, http.StatusOK},
		{"a command, on a listener of both families", "[::ffff:10.0.0.5]:1", "[::ffff:10.0.0.5]:9090", http.Header{"Content-Type": {orderType}}, http.StatusOK},
		{"another machine", "10.0.0.6:1", "10.0.0.5:9090", http.Header{"Content-Type": {orderType}}, http.StatusForbidden},
		{"another machine by IPv6", "[2001:db8::2]:1", "[2001:db8::1]:9090", http.Header{"Content-Type": {orderType}}, http.StatusForbidden},
		{"no address", "@", "127.0.0.1:9090", http.Header{"Content-Type": {orderType}}, http.StatusForbidden},
		{"a form", "127.0.0.1:1", "127.0.0.1:9090", http.Header{"Content-Type": {"text/plain"}}, http.StatusForbidden},
		{"without a type", "127.0.0.1:1", "127.0.0.1:9090", http.Header{}, http.StatusForbidden},
		{"a page of another host", "127.0.0.1:1", "127.0.0.1:9090", http.Header{"Content-Type": {orderType}, "Origin": {"https://evil.example.com"}}, http.StatusForbidden},
		{"a page whose name leads here", "127.0.0.1:1", "127.0.0.1:9090", http.Header{"Content-Type": {orderType}, "Origin": {"http://127.0.0.1:9090"}}, http.StatusForbidden},
		{"a page that hides its origin", "127.0.0.1:1", "127.0.0.1:9090", http.Header{"Content-Type": {orderType}, "Origin": {"null"}}, http.StatusForbidden},
		{"an empty origin", "127.0.0.1:1", "127.0.0.1:9090", http.Header{"Content-Type": {orderType}, "Origin": {""}}, http.StatusForbidden},
		{"a browser", "127.0.0.1:1", "127.0.0.1:9090", http.Header{"Content-Type": {orderType}, "Sec-Fetch-Site": {"same-origin"}}, http.StatusForbidden},
	} {
		orders = 0
		local, err := net.ResolveTCPAddr("tcp", tt.local)
		if err != nil {
			t.Fatal(err)
		}
		r := httptest.NewRequestWithContext(context.WithValue(t.Context(), http.LocalAddrContextKey, net.Addr(local)), http.MethodPost, "http://127.0.0.1:9090/pin/accept", http.NoBody)
		r.RemoteAddr, r.Header = tt.remote, tt.header
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		if w.Code != tt.want || (orders == 1) != (tt.want == http.StatusOK) {
			t.Errorf("%s: %d, %d orders; want %d", tt.name, w.Code, orders, tt.want)
		}
	}
}

// The listener accepts orders by POST alone, and answers no preflight request.
func TestOrderMethods(t *testing.T) {
	var accepted int
	c := running(t, Handler(Config{
		Health:    http.NotFoundHandler(),
		Map:       func(context.Context, string) ([]byte, error) { return nil, nil },
		AcceptPin: func(string) error { accepted++; return nil },
	}))
	for _, method := range []string{http.MethodGet, http.MethodPut, http.MethodOptions, http.MethodPost} {
		r, err := http.NewRequestWithContext(t.Context(), method, "http://"+c.Addr+"/pin/accept", strings.NewReader("hash="))
		if err != nil {
			t.Fatal(err)
		}
		if method != http.MethodPost {
			r.Header.Set("Content-Type", orderType)
		} else {
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded") // of a form
		}
		r.Header.Set("Access-Control-Request-Method", http.MethodPost)
		res, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, res.Body)
		_ = res.Body.Close()
		if res.StatusCode < 400 || res.Header.Get("Access-Control-Allow-Origin") != "" || accepted != 0 {
			t.Errorf("%s: %d, %v, accepted %d", method, res.StatusCode, res.Header, accepted)
		}
	}
}
