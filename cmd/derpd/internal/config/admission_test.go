package config

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/relay/admit"
)

// names are the sources of a configuration, each with what it asks.
func names(c *Config) []string {
	var list []string
	for _, source := range c.Sources {
		list = append(list, source.Name+" "+source.Variable+" "+source.Target)
	}
	return list
}

// socketFile makes a socket that nobody listens on any more, and returns its path.
func socketFile(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "derpd") // a short path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// link is the setup of a symbolic link.
func link(target, name string) setup {
	return func(t *testing.T, dir string) {
		t.Helper()
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
}

// emptyDir is the setup of a directory.
func emptyDir(name string) setup {
	return func(t *testing.T, dir string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSources(t *testing.T) {
	dir := t.TempDir()
	file("keys", "nodekey:"+key64)(t, dir)
	file("regular", "")(t, dir)
	socket := socketFile(t)
	link(socket, "live-link")(t, dir)
	link("/nonexistent", "dead-link")(t, dir)
	for _, tt := range []struct {
		env     string
		want    []string
		onOrder bool
	}{
		{env: ""},
		{env: "DERP_VERIFY_CLIENTS=false", onOrder: true},
		{env: "DERP_VERIFY_CLIENTS=FALSE DERP_TAILSCALED_SOCKET=" + socket, onOrder: true},
		{env: "DERP_VERIFY_CLIENTS=false DERP_ALLOW_KEYS=nodekey:" + key64, want: []string{"keys DERP_ALLOW_KEYS "}},
		{env: "DERP_TAILSCALED_SOCKET=" + socket, want: []string{"tailscaled DERP_TAILSCALED_SOCKET " + socket}},
		{env: "DERP_VERIFY_CLIENTS=Auto DERP_TAILSCALED_SOCKET=" + dir + "/none," + socket + "," + dir + "/none/either", want: []string{"tailscaled DERP_TAILSCALED_SOCKET " + socket}},
		{env: "DERP_TAILSCALED_SOCKET=" + dir + "/live-link", want: []string{"tailscaled DERP_TAILSCALED_SOCKET " + dir + "/live-link"}},
		{env: "DERP_VERIFY_CLIENTS=true DERP_TAILSCALED_SOCKET=" + dir + "/dead-link", want: []string{"tailscaled DERP_TAILSCALED_SOCKET " + dir + "/dead-link"}},
		{env: "DERP_VERIFY_CLIENTS=false DERP_TAILSCALED_SOCKET=" + dir + "/regular," + dir, onOrder: true},
		{env: "DERP_VERIFY_CLIENTS=true DERP_TAILSCALED_SOCKET=/a,/b", want: []string{"tailscaled DERP_TAILSCALED_SOCKET /a", "tailscaled DERP_TAILSCALED_SOCKET /b"}},
		{env: "DERP_VERIFY_CLIENT_URL=https://u:p@a/verify?t=1,http://b/", want: []string{"url DERP_VERIFY_CLIENT_URL https://a/verify", "url DERP_VERIFY_CLIENT_URL http://b/"}},
		{env: "DERP_ALLOW_KEYS=" + dir + "/keys", want: []string{"keys DERP_ALLOW_KEYS " + dir + "/keys"}},
		{env: "DERP_ALLOW_KEYS_FILE=" + dir + "/keys", want: []string{"keys DERP_ALLOW_KEYS_FILE " + dir + "/keys"}},
		{env: "DERP_TAILNET_API_KEY=tskey-api-1,tskey-api-2 DERP_TAILNET_OAUTH_CLIENT_ID=id DERP_TAILNET_OAUTH_CLIENT_SECRET=secret DERP_TAILNET=a,b,c", want: []string{"tailnet DERP_TAILNET a", "tailnet DERP_TAILNET b", "tailnet DERP_TAILNET c"}},
		{env: "DERP_TAILNET_API_KEY=tskey-api-1 DERP_TAILNET=a.com", want: []string{"tailnet DERP_TAILNET a.com"}},
		{env: "DERP_VERIFY_CLIENT_URL=http://b/ DERP_TAILNET_API_KEY=tskey-api-1 DERP_ALLOW_KEYS=nodekey:" + key64 + " DERP_VERIFY_CLIENTS=true DERP_TAILSCALED_SOCKET=/a", want: []string{
			"keys DERP_ALLOW_KEYS ", "tailnet DERP_TAILNET ", "tailscaled DERP_TAILSCALED_SOCKET /a", "url DERP_VERIFY_CLIENT_URL http://b/",
		}},
	} {
		c := good(t, strings.Fields(tt.env)...)
		if got := names(c); !slices.Equal(got, tt.want) || c.Open() != (len(tt.want) == 0) || c.Admission.OpenOnOrder != tt.onOrder {
			t.Errorf("%s: %q, open %t, on order %t; want %q", tt.env, got, c.Open(), c.Admission.OpenOnOrder, tt.want)
		}
	}
}

// New returns a source that asks the real thing.
func TestSourcesAnswer(t *testing.T) {
	member, stranger := key.NewNode().Public(), key.NewNode().Public()
	dir := t.TempDir()
	file("keys", member.String())(t, dir)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var question tailcfg.DERPAdmitClientRequest
		if err := json.NewDecoder(r.Body).Decode(&question); err != nil {
			t.Error(err)
		}
		_ = json.NewEncoder(w).Encode(tailcfg.DERPAdmitClientResponse{Allow: question.NodePublic == member})
	}))
	t.Cleanup(server.Close)
	closed := httptest.NewServer(http.NotFoundHandler())
	closed.Close()

	const none = "unavailable"
	for env, want := range map[string][2]string{ // for the member and the stranger
		"DERP_ALLOW_KEYS=" + member.String():                                                    {"admitted", "refused"},
		"DERP_ALLOW_KEYS=" + dir + "/keys":                                                      {"admitted", "refused"},
		"DERP_ALLOW_KEYS_FILE=" + dir + "/keys":                                                 {"admitted", "refused"},
		"DERP_VERIFY_CLIENT_URL=" + server.URL:                                                  {"admitted", "refused"},
		"DERP_VERIFY_CLIENT_URL=" + closed.URL:                                                  {none, none},
		"DERP_VERIFY_CLIENT_URL_FAIL_OPEN=true DERP_VERIFY_CLIENT_URL=" + closed.URL:            {"admitted", "admitted"},
		"DERP_VERIFY_CLIENTS=true DERP_TAILSCALED_SOCKET=" + dir + "/none":                      {none, none},
		"DERP_TAILNET_API_KEY=tskey-api-1 DERP_TAILNET_API_URL=" + server.URL:                   {none, none}, // until Run has asked
		"DERP_TAILNET_OAUTH_CLIENT_ID=id DERP_TAILNET_OAUTH_CLIENT_SECRET=s DERP_TAILNET=a.com": {none, none},
	} {
		c := good(t, strings.Fields(env)...)
		if len(c.Sources) != 1 {
			t.Errorf("%s: %d sources", env, len(c.Sources))
			continue
		}
		source, err := c.Sources[0].New(zerolog.Nop())
		if err != nil {
			t.Errorf("%s: %v", env, err)
			continue
		}
		for i, node := range []key.NodePublic{member, stranger} {
			got := none
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			switch _, err := source.Ask(ctx, node, netip.MustParseAddr("192.0.2.1")); {
			case err == nil:
				got = "admitted"
			case errors.Is(err, admit.ErrRefused):
				got = "refused"
			}
			cancel()
			if got != want[i] {
				t.Errorf("%s: node %d is %s, want %s", env, i, got, want[i])
			}
		}
	}
}

// DERP_CA_ROOTS verify admission URLs in every mode. The error about an unknown
// authority names the variable.
func TestSourcesTrustRoots(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(tailcfg.DERPAdmitClientResponse{Allow: true})
	}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // refused handshakes
	t.Cleanup(server.Close)
	dir := t.TempDir()
	file("roots.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})))(t, dir)
	for env, want := range map[string]string{
		"DERP_CA_ROOTS=" + dir + "/roots.pem":                                              "<nil>",
		"DERP_ACME_CA_ROOTS=" + dir + "/roots.pem":                                         "<nil>",
		"DERP_CA_ROOTS=" + dir + "/roots.pem DERP_DOMAIN=a.example.com":                    "<nil>",
		"DERP_CA_ROOTS=" + dir + "/roots.pem DERP_DOMAIN=a.example.com DERP_CERT_MODE=off": "<nil>",
		"DERP_LOG_LEVEL=info": "admission URL cannot be reached: tls: failed to verify certificate: x509: certificate signed by unknown authority; if the authority is a private one, set DERP_CA_ROOTS to its roots",
	} {
		c := good(t, append(strings.Fields(env), "DERP_VERIFY_CLIENT_URL="+server.URL)...)
		source, err := c.Sources[0].New(zerolog.Nop())
		if err != nil {
			t.Fatal(err)
		}
		_, err = source.Ask(t.Context(), key.NewNode().Public(), netip.MustParseAddr("192.0.2.1"))
		equal(t, env, fmt.Sprint(err), want)
	}
}

// A file of keys that is gone by the time of the start is an error, and the source has the name of its variable.
func TestKeyFileLost(t *testing.T) {
	for _, name := range []string{"DERP_ALLOW_KEYS", "DERP_ALLOW_KEYS_FILE"} {
		dir := t.TempDir()
		file("keys", "nodekey:"+key64)(t, dir)
		c := good(t, name+"="+dir+"/keys")
		if err := os.Remove(filepath.Join(dir, "keys")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Sources[0].New(zerolog.Nop()); !errors.Is(err, fs.ErrNotExist) || c.Sources[0].Variable != name {
			t.Errorf("%s: %s: %v", name, c.Sources[0].Variable, err)
		}
	}
}

// The settings of admission reach Tailscale's API.
func TestTailnets(t *testing.T) {
	p, extra := new(problems), x509.NewCertPool()
	env := &TailnetEnv{APIKey: "tskey-api-1, tskey-api-2", ClientID: "id", ClientSecret: "secret", Tailnet: "a,b,c", APIURL: "https://api.example.com", External: "true"}
	list := env.tailnets(p, sharedByAll{grace: time.Hour, interval: 2 * time.Minute, roots: extra})
	var got []string
	for _, c := range list {
		got = append(got, fmt.Sprint(c.Tailnet, " ", c.APIKey, " ", c.OAuthClientID, " ", c.OAuthClientSecret, " ", c.External, " ", c.Interval, " ", c.Grace, " ", c.BaseURL))
		if c.Roots != extra {
			t.Errorf("%s: other roots", c.Tailnet)
		}
	}
	want := []string{
		"a tskey-api-1   true 2m0s 1h0m0s https://api.example.com",
		"b tskey-api-2   true 2m0s 1h0m0s https://api.example.com",
		"c  id secret true 2m0s 1h0m0s https://api.example.com",
	}
	if !slices.Equal(got, want) || len(p.found) > 0 {
		t.Errorf("got %q, %v; want %q", got, p.found, want)
	}
	env = &TailnetEnv{APIKey: "tskey-api-1", APIURL: "https://api.example.com", External: "false"}
	if list := env.tailnets(p, sharedByAll{}); len(list) != 1 || list[0].Tailnet != "" || list[0].External {
		t.Errorf("got %+v", list)
	}
}

func TestAdmissionSettings(t *testing.T) {
	c := good(t, "DERP_VERIFY_GRACE=0", "DERP_VERIFY_INTERVAL=1s", "DERP_DISALLOW_APPS=a, b")
	equal(t, "admission", c.Admission, Admission{Interval: time.Second, DisallowApps: []string{"a", "b"}})
	c = good(t, "DERP_VERIFY_CLIENT_URL=https://a/", "DERP_VERIFY_CLIENT_URL_FAIL_OPEN=true")
	equal(t, "warnings", c.Warnings, []string{"DERP_VERIFY_CLIENT_URL_FAIL_OPEN admits anybody while an admission URL cannot be reached; without it, nodes that were admitted before stay admitted for DERP_VERIFY_GRACE"})
	if list := good(t, "DERP_VERIFY_CLIENT_URL=http://headscale:8080/verify").Warnings; len(list) != 1 || !strings.Contains(list[0], "everybody on the way may admit any node") {
		t.Errorf("http to another host: %q", list)
	}
	equal(t, "warnings", len(good(t, "DERP_VERIFY_CLIENT_URL=http://127.0.0.1/,http://localhost/,http://[::1]:1/?a=b,https://u:p@a/").Warnings), 0)
}

// Each way to close an open relay closes it.
func TestHowToClose(t *testing.T) {
	const want = "to close it, set DERP_ALLOW_KEYS, DERP_TAILNET_OAUTH_CLIENT_ID, DERP_VERIFY_CLIENTS=true or DERP_VERIFY_CLIENT_URL"
	equal(t, "text", HowToClose(), want)
	e := readEnvironment(nil, new(problems))
	var kinds []string
	for _, kind := range sourceKinds() {
		kinds = append(kinds, kind.name)
		name, _, _ := strings.Cut(kind.closes, "=")
		if !slices.ContainsFunc(variablesOf(kind.env()), func(v Variable) bool { return v.Name == name }) || e.order[name] == 0 {
			t.Errorf("%s is no variable of the source %s", name, kind.name)
		}
	}
	equal(t, "kinds", kinds, []string{"keys", "tailnet", "tailscaled", "url"})
}

// recordingEnv keeps what a source gets, and answers with parsed.
type recordingEnv struct {
	got    sharedByAll
	parsed parsedSources
}

func (env *recordingEnv) parse(_ *problems, shared sharedByAll) parsedSources {
	env.got = shared
	return env.parsed
}

// Every source gets the shared settings, and its result reaches the configuration.
func TestSourcesShare(t *testing.T) {
	dir := t.TempDir()
	file("name", "a")(t, dir)
	p := new(problems)
	e := readEnvironment([]string{"DERP_VERIFY_GRACE=2h", "DERP_VERIFY_INTERVAL=3s", "DERP_REGION_NAME_FILE=" + dir + "/name"}, p)
	first := &recordingEnv{parsed: parsedSources{list: []Source{{Name: "a"}}, warnings: []string{"w1"}, open: true}}
	second := &recordingEnv{parsed: parsedSources{list: []Source{{Name: "b"}}, warnings: []string{"w2"}}}
	e.sources = []sourceEnv{first, second}
	extra := x509.NewCertPool()
	first.parsed.later = []Source{{Name: "c"}}
	a, sources, later, warnings := parseAdmission(p, e, roots{others: extra})
	for _, env := range []*recordingEnv{first, second} {
		equal(t, "shared", env.got, sharedByAll{
			grace: 2 * time.Hour, interval: 3 * time.Second, files: map[string]string{"DERP_REGION_NAME": dir + "/name"}, roots: extra,
		})
	}
	equal(t, "sources", sources, []Source{{Name: "a"}, {Name: "b"}})
	equal(t, "later, with sources", later, nil)
	equal(t, "warnings", warnings, []string{"w1", "w2"})
	equal(t, "open on order", a.OpenOnOrder, false)
	first.parsed.list, second.parsed.list = nil, nil
	a, _, later, _ = parseAdmission(p, e, roots{})
	equal(t, "open on order", a.OpenOnOrder, true)
	equal(t, "later", later, []Source{{Name: "c"}})
	first.parsed.open = false
	a, _, _, _ = parseAdmission(p, e, roots{})
	equal(t, "open on order", a.OpenOnOrder, false)
}
