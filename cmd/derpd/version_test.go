package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"derpd/internal/testkit"
)

// TestVersionCheck asserts the output and the exit code of `derpd version --check`,
// which a bad configuration of the relay does not matter to.
func TestVersionCheck(t *testing.T) {
	for name, tt := range map[string]struct {
		status     int
		list       string
		code       int
		stdout     string // all of it, in which HERE is the version of tailscale.com
		wantStderr string // a part
	}{
		"newest": {http.StatusOK, upstreamVersion(), 0, "tailscale.com HERE is the newest release\n", ""},
		"newer":  {http.StatusOK, "v9.98.0", 3, "tailscale.com v9.98.0 is out (here: HERE); take a newer release of derpd, or run `make upstream` in its sources\n", ""},
		"failed": {http.StatusForbidden, "", 1, "", "derpd: version: it is not known whether a newer release is out: GOPROXY: "},
	} {
		proxy := httptest.NewServer(answer(tt.status, tt.list))
		t.Cleanup(proxy.Close)
		stdout, stderr, code := execute(t, []string{"GOPROXY=" + proxy.URL, "DERP_REGION_ID=7"}, "version", "--check")
		want := strings.ReplaceAll(tt.stdout, "HERE", upstreamVersion())
		if code != tt.code || stdout != want || (stderr == "") != (tt.wantStderr == "") || !strings.HasPrefix(stderr, tt.wantStderr) {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q; want %d, %q, %q", name, code, stdout, stderr, tt.code, want, tt.wantStderr)
		}
	}
}

// TestVersionCheckThroughProxy asserts that the question goes through the proxy of
// the environment, and that a build with a known repository asks GitHub first.
func TestVersionCheckThroughProxy(t *testing.T) {
	asked := make(chan string, 10)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.Method + " " + r.RequestURI
		if r.Method == http.MethodConnect {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		_, _ = fmt.Fprintln(w, "v9.98.0")
	}))
	t.Cleanup(proxy.Close)
	derpd := filepath.Join(t.TempDir(), "derpd")
	build := exec.CommandContext(t.Context(), "go", "build", "-ldflags", "-X main.version=1.104.7-1 -X main.source=https://github.com/someone/derpd", "-o", derpd, ".")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	unknown := filepath.Join(t.TempDir(), "derpd")
	if err := os.Symlink(self, unknown); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		program, asked string
		code           int
		output         string
	}{
		{unknown, "GET http://goproxy.example/tailscale.com/@v/list", 3, "tailscale.com v9.98.0 is out (here: "},
		{derpd, "CONNECT api.github.com:443", 3, "; GOPROXY was asked, because https://api.github.com/repos/someone/derpd/releases/latest: "},
	} {
		cmd := exec.CommandContext(t.Context(), tt.program, "version", "--check")
		cmd.Env = []string{"HTTP_PROXY=" + proxy.URL, "HTTPS_PROXY=" + proxy.URL, "GOPROXY=http://goproxy.example"}
		out, _ := cmd.CombinedOutput()
		if got := testkit.Receive(t, "a request", asked); got != tt.asked || cmd.ProcessState.ExitCode() != tt.code || !strings.Contains(string(out), tt.output) {
			t.Errorf("exit code %d, the proxy got %s; want %d, %s\n%s", cmd.ProcessState.ExitCode(), got, tt.code, tt.asked, out)
		}
	}
}
