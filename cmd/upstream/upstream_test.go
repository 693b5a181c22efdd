package main

import (
	"testing"

	"github.com/rogpeppe/go-internal/goproxytest"
	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"upstream": main})
}

// The scripts in testdata run the whole program against a module proxy with the
// versions in testdata/modules: odd minor versions, pre-releases, a retracted
// version and skipped numbers. In testdata/toonew, the newest release needs a Go
// version that does not exist.
func TestScripts(t *testing.T) {
	proxy := goproxytest.NewTestServer(t, "testdata/modules", "").URL
	tooNew := goproxytest.NewTestServer(t, "testdata/toonew", "").URL
	registry, digest := startRegistry(t)
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("GOPROXY", proxy)
			env.Setenv("TOONEW", tooNew)
			env.Setenv("REGISTRY", registry)
			env.Setenv("DIGEST", digest)
			env.Setenv("GOPATH", env.WorkDir+"/.gopath")
			env.Setenv("GOCACHE", env.WorkDir+"/.cache")
			env.Setenv("GOSUMDB", "off")
			env.Setenv("GOENV", "off")
			// Without this the directory of the script cannot be removed.
			env.Setenv("GOFLAGS", "-modcacherw")
			return nil
		},
	})
}

func TestNewest(t *testing.T) {
	for name, test := range map[string]struct {
		released  []string
		evenMinor bool
		want      string
	}{
		"a patch number is skipped":  {[]string{"v1.104.0", "v1.104.2", "v1.104.4"}, true, "v1.104.4"},
		"numbers, not letters":       {[]string{"v1.104.9", "v1.104.10"}, true, "v1.104.10"},
		"any order":                  {[]string{"v1.104.1", "v1.98.9", "v1.104.0"}, true, "v1.104.1"},
		"odd minor versions":         {[]string{"v1.104.0", "v1.105.0", "v1.105.3"}, true, "v1.104.0"},
		"odd ones of another module": {[]string{"v0.24.0", "v0.25.0"}, false, "v0.25.0"},
		"pre-releases":               {[]string{"v1.104.0", "v1.106.0-pre", "v1.106.0-rc.1"}, true, "v1.104.0"},
		"not a version":              {[]string{"v1.104.0", "v1.106", "1.106.0", "v1.106.0+x", "v1.0106.0", ""}, true, "v1.104.0"},
		"pseudo-versions":            {[]string{"v1.104.0", "v1.106.1-0.20261101000000-0123456789ab"}, true, "v1.104.0"},
		"a new major version":        {[]string{"v1.104.0", "v2.0.0"}, true, "v2.0.0"},
		"no stable version":          {[]string{"v1.105.0", "v1.106.0-pre"}, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			if got := newest(test.released, test.evenMinor); got != test.want {
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
