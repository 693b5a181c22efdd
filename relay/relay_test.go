package relay_test

import (
	"context"
	"errors"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
	"derpd/relay"
)

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

// A key file is complete or not there. So the file is written beside its path and
// then takes its place, even that of a link which leads nowhere.
func TestKeyTakesItsPlace(t *testing.T) {
	dir := t.TempDir()
	path, elsewhere := filepath.Join(dir, "node.key"), filepath.Join(dir, "elsewhere")
	if err := os.Symlink(elsewhere, path); err != nil {
		t.Fatal(err)
	}
	if _, err := relay.LoadOrCreateKey(path); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(elsewhere); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the key was written through the link: %v", err)
	}
	if _, err := relay.LoadKey(path); err != nil {
		t.Error(err)
	}
}

// A malformed key file is an error, and never replaced: it may be the only copy.
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

// A copy of derper's configuration file is a key file.
func TestKeyOfDerper(t *testing.T) {
	path := filepath.Join(t.TempDir(), "derper.key")
	text, err := key.NewNode().MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	// The format of cmd/derper.
	if err := os.WriteFile(path, []byte("{\n\t\"PrivateKey\": \""+string(text)+"\"\n}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := relay.LoadKey(path); err != nil {
		t.Error(err)
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
			t.Errorf("%q was accepted", bad)
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

// The response contains the addresses of the names. The hosts file contains
// localhost.
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
	testkit.Until(t, "the address of localhost", func() bool { return strings.Contains(ask(), `"127.0.0.1"`) })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
