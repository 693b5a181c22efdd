package main

import (
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/goproxytest"
	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"upstream": main})
}

// The scripts in testdata run the whole program against a module proxy with the
// versions in testdata/modules: odd minor versions, pre-releases, a retracted
// version, skipped numbers, and a test whose import is missing. In testdata/toonew,
// the newest release needs a Go version that does not exist. In testdata/needs it
// needs a module that is compiled, codec, and one that is not, tunnel.
func TestScripts(t *testing.T) {
	proxy := goproxytest.NewTestServer(t, "testdata/modules", "").URL
	tooNew := goproxytest.NewTestServer(t, "testdata/toonew", "").URL
	needs := goproxytest.NewTestServer(t, "testdata/needs", "").URL
	faulty := startFaulty(t, needs)
	registry, digest := startRegistry(t)
	// Programs of the scripts import nothing, but their tests need the standard library.
	cache, err := exec.CommandContext(t.Context(), "go", "env", "GOCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("GOPROXY", proxy)
			env.Setenv("TOONEW", tooNew)
			env.Setenv("TOONEW_HANGS", startFaulty(t, tooNew)+"/toolchain-hangs")
			env.Setenv("NEEDS", needs)
			env.Setenv("FAULTY", faulty)
			env.Setenv("REGISTRY", registry)
			env.Setenv("DIGEST", digest)
			env.Setenv("GOPATH", env.WorkDir+"/.gopath")
			env.Setenv("GOCACHE", strings.TrimSpace(string(cache)))
			env.Setenv("GOSUMDB", "off")
			env.Setenv("GOENV", "off")
			// Without this the directory of the script cannot be removed.
			env.Setenv("GOFLAGS", "-modcacherw")
			return nil
		},
	})
}

// Each module is taken once, in the highest of the fixed versions.
func TestFixTargets(t *testing.T) {
	got := fixes{
		{"GO-1", "example.com/a", "v1.2.10"},
		{"GO-2", "example.com/a", "v1.2.9"},
		{"GO-3", "example.com/b", "v0.1.0"},
		{"GO-4", "example.com/b", "v0.2.0"},
		{"GO-5", stdlib, "v1.27.4"},
		{"GO-6", "example.com/c", "not a version"},
	}.targets()
	slices.Sort(got)
	if want := []string{"example.com/a@v1.2.10", "example.com/b@v0.2.0", "go@1.27.4"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// Errors of go mod tidy, recorded: a module is listed once, however many packages
// import it.
func TestNotFetched(t *testing.T) {
	const refused = "go: derpd/healthz imports\n\ttailscale.com/feature tested by\n\ttailscale.com/feature.test imports\n\t"
	const answer = " 403 Forbidden\n\tserver response: This module version is not available.\n"
	got := notFetched("go: downloading github.com/tailscale/wireguard-go v0.0.0-20261106233718-9e0ab45c16ca\n" +
		refused + "gvisor.dev/gvisor/pkg/tcpip: gvisor.dev/gvisor@v0.0.0-20260915211658-a6f909f08a72: reading https://proxy.example/gvisor.zip:" + answer +
		refused + "gvisor.dev/gvisor/pkg/buffer: gvisor.dev/gvisor@v0.0.0-20260915211658-a6f909f08a72: reading https://proxy.example/gvisor.zip:" + answer +
		refused + "github.com/tailscale/wireguard-go/tun: github.com/tailscale/wireguard-go@v0.0.0-20261106233718-9e0ab45c16ca: reading https://proxy.example/wireguard.zip:" + answer +
		refused + "example.com/unavailable: cannot find module providing package example.com/unavailable: reading https://proxy.example/list: 404 Not Found\n")
	want := []string{
		"example.com/unavailable",
		"github.com/tailscale/wireguard-go@v0.0.0-20261106233718-9e0ab45c16ca",
		"gvisor.dev/gvisor@v0.0.0-20260915211658-a6f909f08a72",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := notFetched("go: downloading example.com/a v1.0.0\n"); len(got) > 0 {
		t.Errorf("%q, want nothing", got)
	}
}

// Each vulnerability is listed once, however many calls reach it.
func TestFindings(t *testing.T) {
	const finding = `{"finding":{"osv":"GO-1","fixed_version":"v1.2.1","trace":[{"module":"m","function":"F"}]}}`
	const imported = `{"finding":{"osv":"GO-2","fixed_version":"v1.2.1","trace":[{"module":"m"}]}}`
	got, err := parseFindings(strings.NewReader(finding + finding + imported + `{"finding":{"osv":"GO-3","trace":[]}}{"config":{}}`))
	if want := []fix{{"GO-1", "m", "v1.2.1"}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	if _, err := parseFindings(strings.NewReader(finding + "{")); err == nil {
		t.Error("no error of an answer that is cut off")
	}
}

// Of several entries for a variable the last one counts.
func TestVariable(t *testing.T) {
	env := []string{"A=1", "AB=2", "A=3", "B="}
	for name, want := range map[string]string{"A": "3", "AB": "2", "B": "", "C": ""} {
		if got := variable(env, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
}

func TestExitCode(t *testing.T) {
	for _, test := range []struct {
		args []string
		want int
	}{
		{[]string{"--help"}, exitOK},
		{[]string{"publish"}, exitUsage},
		{[]string{"--wirte"}, exitUsage},
		{[]string{"tags", "1.104.5", "derpd"}, exitUsage},
		{[]string{"notes", "0.0.0-1"}, exitFailed}, // no changelog in this directory
	} {
		if got := exitCode(run(t.Context(), test.args, nil, io.Discard), io.Discard); got != test.want {
			t.Errorf("%q: exit code %d, want %d", test.args, got, test.want)
		}
	}
}

func TestReplaceVersion(t *testing.T) {
	const text = "Go 1.27.3. `go1.27.3`, 1.27.3, not 11.27.3, 1.27.31, 1.27.3.1 or 0.1.27.3"
	const want = "Go 1.28.0. `go1.28.0`, 1.28.0, not 11.27.3, 1.27.31, 1.27.3.1 or 0.1.27.3"
	if got := replaceVersion(text, "1.27.3", "1.28.0"); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
