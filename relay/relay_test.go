package relay_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"
	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/netmon"
	"tailscale.com/net/stun"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"derpd/relay"
)

const patience = 30 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node.key")
	if _, err := relay.LoadKey(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("without a file: %v, want fs.ErrNotExist", err)
	}
	first, err := relay.LoadOrCreateKey(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
	again, err := relay.LoadOrCreateKey(path)
	if err != nil || !again.Equal(first) {
		t.Errorf("the key changed by a restart, %v", err)
	}
	if left, _ := filepath.Glob(path + ".*"); len(left) > 0 {
		t.Errorf("files were left behind: %v", left)
	}
}

// A key that cannot be read is an error, never replaced: it may be the only
// copy.
func TestKeyIsNeverReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node.key")
	for _, content := range []string{"", "{}", "nonsense", `{"PrivateKey":"privkey:0000000000000000000000000000000000000000000000000000000000000000"}`} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := relay.LoadOrCreateKey(path); err == nil || !strings.Contains(err.Error(), "holds no node key") {
			t.Errorf("%q: %v", content, err)
		}
		if after, _ := os.ReadFile(path); string(after) != content {
			t.Errorf("%q was replaced", content)
		}
	}
}

// derper's own configuration file can be copied.
func TestKeyOfDerper(t *testing.T) {
	path := filepath.Join(t.TempDir(), "derper.key")
	text, err := key.NewNode().MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	// The shape that cmd/derper writes.
	if err := os.WriteFile(path, []byte("{\n\t\"PrivateKey\": \""+string(text)+"\"\n}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := relay.LoadKey(path); err != nil {
		t.Error(err)
	}
}

// Two relays in one process ask their own admission functions.
func TestAdmissionStaysApart(t *testing.T) {
	member := key.NewNode()
	for name, tt := range map[string]struct {
		admit relay.AdmitFunc
		want  bool
	}{
		"open":      {nil, true},
		"nobody":    {func(context.Context, key.NodePublic, netip.Addr) error { return errors.New("closed") }, false},
		"everybody": {func(context.Context, key.NodePublic, netip.Addr) error { return nil }, true},
		"by key and address": {func(_ context.Context, k key.NodePublic, a netip.Addr) error {
			if k != member.Public() || !a.IsLoopback() {
				return errors.New("unknown")
			}
			return nil
		}, true},
	} {
		home, err := relay.Home("blank")
		if err != nil {
			t.Fatal(err)
		}
		r, err := relay.New(relay.Config{PrivateKey: key.NewNode(), Admit: tt.admit, Home: home, BootstrapDNS: relay.NewBootstrapDNS(nil, zerolog.Nop()), Log: zerolog.Nop()})
		if err != nil {
			t.Fatal(err)
		}
		server := httptest.NewServer(r.Handler())
		c, err := derphttp.NewClient(member, server.URL+"/derp", logger.Discard, netmon.NewStatic())
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Connect(t.Context()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		message, err := c.Recv()
		if _, ok := message.(derp.ServerInfoMessage); ok != tt.want {
			t.Errorf("%s: admitted %t (%v), want %t", name, ok, err, tt.want)
		}
		_ = c.Close()
		_ = r.Close()
		server.Close()
	}
}

func TestHome(t *testing.T) {
	for value, want := range map[string]struct {
		status   int
		location string
	}{
		"blank":                  {200, ""},
		"page":                   {200, ""},
		"https://example.com/me": {302, "https://example.com/me"},
	} {
		h, err := relay.Home(value)
		if err != nil {
			t.Fatal(err)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody))
		if w.Code != want.status || w.Header().Get("Location") != want.location {
			t.Errorf("%s: %d %s", value, w.Code, w.Header().Get("Location"))
		}
		for _, word := range []string{"derp", "tailscale", "<h1>"} {
			if strings.Contains(strings.ToLower(w.Body.String()), word) {
				t.Errorf("%s shows %q to scanners", value, word)
			}
		}
	}
	for _, bad := range []string{"", "ftp://example.com", "https://", "example.com"} {
		if _, err := relay.Home(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestRedirect(t *testing.T) {
	for _, tt := range []struct {
		host string
		port int
		want string
	}{
		{"derp.example.com", 443, "https://derp.example.com/a?b=c"},
		{"derp.example.com:80", 443, "https://derp.example.com/a?b=c"},
		{"derp.example.com", 8443, "https://derp.example.com:8443/a?b=c"},
		{"203.0.113.7:8080", 8443, "https://203.0.113.7:8443/a?b=c"},
		{"[2001:db8::7]", 443, "https://[2001:db8::7]/a?b=c"},
		{"[2001:db8::7]:80", 8443, "https://[2001:db8::7]:8443/a?b=c"},
		{"", 443, ""},
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/a?b=c", http.NoBody)
		r.Host = tt.host
		w := httptest.NewRecorder()
		relay.RedirectHandler(tt.port).ServeHTTP(w, r)
		if got := w.Header().Get("Location"); got != tt.want {
			t.Errorf("%s to port %d: %d %q, want %q", tt.host, tt.port, w.Code, got, tt.want)
		}
	}
}

// localhost is in every machine's hosts file.
func TestBootstrapDNS(t *testing.T) {
	b := relay.NewBootstrapDNS([]string{"localhost"}, zerolog.Nop())
	ask := func() string {
		w := httptest.NewRecorder()
		b.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/bootstrap-dns", http.NoBody))
		return w.Body.String()
	}
	if got := ask(); got != "{}" {
		t.Errorf("before Run: %q", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	deadline, tick := time.After(patience), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	for !strings.Contains(ask(), `"127.0.0.1"`) {
		select {
		case <-deadline:
			t.Fatalf("got %s", ask())
		case <-tick.C:
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// startSTUN runs a STUN server on a free loopback port.
func startSTUN(t *testing.T) (*relay.STUN, *net.UDPConn) {
	t.Helper()
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	s, err := relay.NewSTUN(conn, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	client, err := net.DialUDP("udp", nil, conn.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = client.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s, client
}

// STUN is closed until it is opened, and again when it is closed.
func TestSTUNGate(t *testing.T) {
	s, client := startSTUN(t)
	buf := make([]byte, 1500)
	send := func() stun.TxID {
		tx := stun.NewTxID()
		if _, err := client.Write(stun.Request(tx)); err != nil {
			t.Fatal(err)
		}
		return tx
	}
	for round := range 3 {
		send()
		// A closed server leaves no trace: only silence for a while tells.
		if err := client.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if n, err := client.Read(buf); err == nil {
			t.Fatalf("round %d: a closed server answered %x", round, buf[:n])
		}
		s.SetOpen(true)
		want := send()
		if err := client.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		n, err := client.Read(buf)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		got, addr, err := stun.ParseResponse(buf[:n])
		if err != nil || got != want || addr != client.LocalAddr().(*net.UDPAddr).AddrPort() {
			t.Fatalf("round %d: got %v for %s, %v", round, got, addr, err)
		}
		s.SetOpen(false)
	}
}

// Strangers send anything; the next real request is answered all the same.
func TestSTUNIgnoresNonsense(t *testing.T) {
	s, client := startSTUN(t)
	s.SetOpen(true)
	request := stun.Request(stun.NewTxID())
	flipped := append([]byte(nil), request...)
	flipped[len(flipped)-1] ^= 1 // the fingerprint
	for _, packet := range [][]byte{{}, {0}, request[:19], flipped, make([]byte, 4000)} {
		if _, err := client.Write(packet); err != nil {
			t.Fatal(err)
		}
	}
	tx := stun.NewTxID()
	if _, err := client.Write(stun.Request(tx)); err != nil {
		t.Fatal(err)
	}
	if err := client.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1500)
	n, err := client.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	if got, _, err := stun.ParseResponse(buf[:n]); err != nil || got != tx {
		t.Errorf("the first answer is for %v, want %v, %v", got, tx, err)
	}
}
