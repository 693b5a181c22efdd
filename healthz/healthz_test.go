package healthz

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stun"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

func fixed(name string, r Result) Check {
	return Check{name, func(context.Context) Result { return r }}
}

func ask(t *testing.T, h *Health, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, http.NoBody))
	return w.Code, w.Body.String()
}

func TestReady(t *testing.T) {
	h := New([]Check{fixed("listeners", Okf(":443")), fixed("admission", Warnf("open"))})
	code, body := ask(t, h, "/readyz")
	if want := "ready\nok   listeners: :443\nwarn admission: open\n"; code != http.StatusOK || body != want {
		t.Errorf("%d %q, want 200 %q", code, body, want)
	}
}

// The first failure is the cause, though a later one may be found sooner.
func TestFirstCause(t *testing.T) {
	later := make(chan struct{})
	h := New([]Check{
		fixed("listeners", Okf(":443")),
		{"certificate", func(context.Context) Result { <-later; return Failf("expired") }},
		{"derp", func(context.Context) Result { close(later); return Failf("no handshake") }},
	})
	code, body := ask(t, h, "/readyz")
	if want := "not ready: certificate: expired\nok   listeners: :443\nfail certificate: expired\nfail derp: no handshake\n"; code != http.StatusServiceUnavailable || body != want {
		t.Errorf("%d %q, want 503 %q", code, body, want)
	}
	code, body = ask(t, h, "/healthz")
	var report struct {
		Ready  bool
		Cause  string
		Checks []struct{ Name, Level, Detail string }
	}
	if err := json.Unmarshal([]byte(body), &report); err != nil || code != http.StatusServiceUnavailable || report.Ready ||
		report.Cause != "certificate: expired" || len(report.Checks) != 3 || report.Checks[2].Level != "fail" {
		t.Errorf("%d %s, %v", code, body, err)
	}
	if code, body := ask(t, h, "/livez"); code != http.StatusOK || body != "ok\n" {
		t.Errorf("livez: %d %q", code, body)
	}
}

// Nobody can make the relay probe itself as often as they like.
func TestReportIsReused(t *testing.T) {
	runs := 0
	h := New([]Check{{"count", func(context.Context) Result { runs++; return Okf("%d", runs) }}})
	h.Report(t.Context())
	h.Report(t.Context())
	if runs != 1 {
		t.Errorf("%d rounds for two questions at once, want 1", runs)
	}
	h.Changed()
	h.Report(t.Context())
	if runs != 2 {
		t.Errorf("%d rounds after a change, want 2", runs)
	}
	h.Stopping()
	if r := h.Report(t.Context()); r.Ready || r.Cause != "the relay is stopping" {
		t.Errorf("stopping: %+v", r)
	}
}

// server is an upstream relay that asks url about clients.
func server(t *testing.T, url string) DERPProbe {
	t.Helper()
	s := derpserver.New(key.NewNode(), logger.Discard)
	if url != "" {
		s.SetVerifyClientURL(url)
		s.SetVerifyClientURLFailOpen(false)
	}
	h := httptest.NewServer(derpserver.Handler(s))
	t.Cleanup(func() { _ = s.Close(); h.Close() })
	return DERPProbe{Host: "localhost", From: key.NewNode(), To: key.NewNode(), Dial: func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", h.Listener.Addr().String())
	}}
}

func TestDERPProbe(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	t.Run("works", func(t *testing.T) {
		if took, err := server(t, "").Run(ctx); err != nil || took <= 0 {
			t.Errorf("%s, %v", took, err)
		}
	})
	t.Run("refused", func(t *testing.T) {
		refuse := httptest.NewServer(http.NotFoundHandler())
		t.Cleanup(refuse.Close)
		if _, err := server(t, refuse.URL).Run(ctx); err == nil || !strings.Contains(err.Error(), "hung up after the handshake") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("nobody listens", func(t *testing.T) {
		p := server(t, "")
		p.Dial = func(context.Context) (net.Conn, error) { return nil, errors.New("refused") }
		if _, err := p.Run(ctx); err == nil {
			t.Error("a probe of nobody passed")
		}
	})
	t.Run("silence", func(t *testing.T) {
		p := server(t, "")
		near, far := net.Pipe()
		t.Cleanup(func() { _ = near.Close(); _ = far.Close() })
		p.Dial = func(context.Context) (net.Conn, error) { return near, nil }
		short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		defer cancel()
		if _, err := p.Run(short); err == nil {
			t.Error("a probe of silence passed")
		}
	})
}

// stunServer answers each request with what reply makes of it.
func stunServer(t *testing.T, reply func(stun.TxID, netip.AddrPort) []byte) netip.AddrPort {
	t.Helper()
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	go func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if tx, err := stun.ParseBindingRequest(buf[:n]); err == nil {
				_, _ = conn.WriteToUDPAddrPort(reply(tx, from), from)
			}
		}
	}()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

func TestSTUNProbe(t *testing.T) {
	if took, err := STUN(t.Context(), stunServer(t, stun.Response)); err != nil || took <= 0 {
		t.Errorf("%s, %v", took, err)
	}
	gateway := netip.MustParseAddrPort("172.17.0.1:4242")
	if _, err := STUN(t.Context(), stunServer(t, func(tx stun.TxID, _ netip.AddrPort) []byte { return stun.Response(tx, gateway) })); err == nil || !strings.Contains(err.Error(), "the answer names 172.17.0.1:4242") {
		t.Errorf("a wrong address: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := STUN(ctx, stunServer(t, func(stun.TxID, netip.AddrPort) []byte { return []byte("x") })); err == nil || !strings.Contains(err.Error(), "no answer from") {
		t.Errorf("nonsense: %v", err)
	}
}
