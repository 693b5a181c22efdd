package main

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/rogpeppe/go-internal/goproxytest"
	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"upstream": main})
}

// The scripts in testdata run the whole program against a module proxy with
// the versions in testdata/modules: odd minor ones, pre-releases, a retracted
// one and skipped numbers. In testdata/toonew, the newest release needs a Go
// that nobody has.
func TestScripts(t *testing.T) {
	proxy := goproxytest.NewTestServer(t, "testdata/modules", "").URL
	tooNew := goproxytest.NewTestServer(t, "testdata/toonew", "").URL
	registry := newRegistry(t)
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("GOPROXY", proxy)
			env.Setenv("TOONEW", tooNew)
			env.Setenv("REGISTRY", registry)
			env.Setenv("GOPATH", env.WorkDir+"/.gopath")
			env.Setenv("GOCACHE", env.WorkDir+"/.cache")
			env.Setenv("GOSUMDB", "off")
			env.Setenv("GOENV", "off")
			// Or the directory of the script could not be removed.
			env.Setenv("GOFLAGS", "-modcacherw")
			return nil
		},
	})
}

// newRegistry serves images as a registry does that gives everybody a pass:
// the base image, its successor, and a derpd that was built on the base image.
func newRegistry(t *testing.T) string {
	const baseOf13 = "sha256:1313131313131313131313131313131313131313131313131313131313131313"
	answers := map[string]string{
		"/v2/distroless/static-debian12/manifests/nonroot": "{}",
		"/v2/distroless/static-debian13/manifests/nonroot": "{}",
		"/v2/someone/derpd/manifests/latest":               `{"manifests":[{"digest":"sha256:a1"},{"digest":"sha256:a2"}]}`,
		"/v2/someone/derpd/manifests/sha256:a1":            `{"config":{"digest":"sha256:c1"}}`,
		"/v2/someone/derpd/blobs/sha256:c1":                `{"config":{"Labels":{"org.opencontainers.image.base.digest":"` + baseOf13 + `"}}}`,
		"/v2/someone/other/manifests/latest":               `{"config":{"digest":"sha256:c2"}}`,
		"/v2/someone/other/blobs/sha256:c2":                `{"config":{}}`,
	}
	var server *httptest.Server
	server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			if r.FormValue("service") != "images" || r.FormValue("scope") != "repository:any:pull" {
				http.Error(w, "", http.StatusForbidden)
				return
			}
			_, _ = w.Write([]byte(`{"token":"for everybody"}`))
			return
		}
		if r.Header.Get("Authorization") != "Bearer for everybody" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+server.URL+`/token",service="images",scope="repository:any:pull"`)
			http.Error(w, "", http.StatusUnauthorized)
			return
		}
		body, ok := answers[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Docker-Content-Digest", baseOf13)
		_, _ = w.Write([]byte(body))
	}))
	t.Cleanup(server.Close)
	return server.URL
}

func TestNewest(t *testing.T) {
	for name, test := range map[string]struct {
		released  []string
		evenMinor bool
		want      string
	}{
		"a patch number is skipped":     {[]string{"v1.104.0", "v1.104.2", "v1.104.4"}, true, "v1.104.4"},
		"numbers, not letters":          {[]string{"v1.104.9", "v1.104.10"}, true, "v1.104.10"},
		"the order is the proxy's":      {[]string{"v1.104.1", "v1.98.9", "v1.104.0"}, true, "v1.104.1"},
		"odd minor versions":            {[]string{"v1.104.0", "v1.105.0", "v1.105.3"}, true, "v1.104.0"},
		"odd ones of another module":    {[]string{"v0.24.0", "v0.25.0"}, false, "v0.25.0"},
		"pre-releases":                  {[]string{"v1.104.0", "v1.106.0-pre", "v1.106.0-rc.1"}, true, "v1.104.0"},
		"what is no version":            {[]string{"v1.104.0", "v1.106", "1.106.0", "v1.106.0+x", "v1.0106.0", ""}, true, "v1.104.0"},
		"pseudo-versions":               {[]string{"v1.104.0", "v1.106.1-0.20261101000000-0123456789ab"}, true, "v1.104.0"},
		"a new major version":           {[]string{"v1.104.0", "v2.0.0"}, true, "v2.0.0"},
		"there is no stable one at all": {[]string{"v1.105.0", "v1.106.0-pre"}, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got := ""
			if v, ok := newest(test.released, test.evenMinor); ok {
				got = v.String()
			}
			if got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestReplaceVersion(t *testing.T) {
	const text = "Go 1.27.3. `go1.27.3`, 1.27.3, not 11.27.3, 1.27.31, 1.27.3.1 or 0.1.27.3"
	const want = "Go 1.28.0. `go1.28.0`, 1.28.0, not 11.27.3, 1.27.31, 1.27.3.1 or 0.1.27.3"
	if got := replaceVersion(text, "1.27.3", "1.28.0"); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestReference(t *testing.T) {
	for image, want := range map[string][3]string{
		"gcr.io/distroless/static-debian13:nonroot": {"gcr.io", "distroless/static-debian13", "nonroot"},
		"localhost:5000/derpd":                      {"localhost:5000", "derpd", "latest"},
		"mirror.example:5000/a/b:1.2":               {"mirror.example:5000", "a/b", "1.2"},
		"golang:1.27":                               {"registry-1.docker.io", "library/golang", "1.27"},
		"someone/derpd":                             {"registry-1.docker.io", "someone/derpd", "latest"},
	} {
		host, name, tag := reference(image)
		if got := [3]string{host, name, tag}; got != want {
			t.Errorf("%s: %q, want %q", image, got, want)
		}
	}
}
