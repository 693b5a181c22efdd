package main

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// execute runs a command line as main does, and returns what it prints and its
// exit code.
func execute(t *testing.T, env []string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	var out, errs strings.Builder
	code = exitCode(run(ctx, time.Now(), args, testkit.LastOfEach(env), &out, &errs), &errs)
	return out.String(), errs.String(), code
}

// TestAdmit asks a running relay about nodes. The exit code is the decision.
func TestAdmit(t *testing.T) {
	member := key.NewNode().Public()
	env := testkit.Environ(t, "DERP_ALLOW_KEYS="+member.String())
	p := startProgram(t, env)
	env = append(env, "DERP_ADMIN_ADDR="+p.admin)
	for _, tt := range []struct {
		name, node           string
		code                 int
		wantStdout, wantText string // the whole of stdout, and a part of stderr
	}{
		{"a member", member.String(), 0, "1 keys: yes\nadmitted: a source says yes\nlimit: no limit on what it sends, 16 connections (DERP_CLIENT_RATE, DERP_MAX_PER_NODE)\n", ""},
		{"a stranger", key.NewNode().Public().String(), 1, "1 keys: no\nrefused: every source says no\n", ""},
		{"no key", "laptop", 2, "", `admit: want nodekey: and 64 hex digits`},
		{"the zero key", "nodekey:" + strings.Repeat("0", 64), 2, "", `admit: want nodekey: and 64 hex digits`},
	} {
		stdout, stderr, code := execute(t, env, "admit", tt.node)
		if code != tt.code || stdout != tt.wantStdout || (stderr == "") != (tt.wantText == "") || !strings.Contains(stderr, tt.wantText) {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q; want %d, %q, %q", tt.name, code, stdout, stderr, tt.code, tt.wantStdout, tt.wantText)
		}
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, code := execute(t, env, "admit", member.String())
	if want := "no relay answers on DERP_ADMIN_ADDR " + p.admin; code != 1 || stdout != "" || !strings.Contains(stderr, want) {
		t.Errorf("without a relay: exit code %d, stdout %q, stderr %q; want %q", code, stdout, stderr, want)
	}
	_, stderr, code = execute(t, append(env, `DERP_ADMIN_ADDR="127.0.0.1:1"`), "admit", member.String())
	if code != 2 || !strings.Contains(stderr, "DERP_ADMIN_ADDR: ") {
		t.Errorf("with a bad address: exit code %d, %s", code, stderr)
	}
}

// TestHealthcheck asserts that the exit code follows the health of the relay, and
// that the report goes to stdout alone.
func TestHealthcheck(t *testing.T) {
	for report, want := range map[string]int{"ready\n": 0, "not ready: derp\nfail derp: closed\n": 1} {
		status := http.StatusOK
		if want != 0 {
			status = http.StatusServiceUnavailable
		}
		server := httptest.NewServer(answer(status, report))
		t.Cleanup(server.Close)
		stdout, stderr, code := execute(t, testkit.Environ(t, "DERP_ADMIN_ADDR="+server.Listener.Addr().String()), "healthcheck")
		if code != want || stdout != report || stderr != "" {
			t.Errorf("%q: exit code %d, stdout %q, stderr %q", report, code, stdout, stderr)
		}
	}
}

// TestHelp asserts that the help of derpd and of each command goes to stdout,
// with exit code 0, whatever the environment is.
func TestHelp(t *testing.T) {
	env := []string{"DERP_DOMIAN=x"}
	overview, _, _ := execute(t, env, "help")
	for _, args := range [][]string{{"help"}, {"-h"}, {"--help"}} {
		stdout, stderr, code := execute(t, env, args...)
		if code != 0 || stdout != overview || stderr != "" {
			t.Errorf("%v: exit code %d, stdout %q, stderr %q", args, code, stdout, stderr)
		}
	}
	for i, v := range verbs() {
		line := strings.TrimSpace(v.name + " " + v.args)
		if n := strings.Count(overview, v.help+"\n"); i > 0 && n != 1 || !strings.Contains(overview, "\n  "+line+" ") {
			t.Errorf("derpd help lacks %q, %q:\n%s", line, v.help, overview)
		}
		want := "usage: derpd " + line + "\n\n" + v.help + "\n"
		for _, args := range [][]string{{v.name, "--help"}, {v.name, "-h"}, {"help", v.name}} {
			if args[0] == "help" && args[1] == "help" {
				continue
			}
			stdout, stderr, code := execute(t, env, args...)
			if code != 0 || !strings.HasPrefix(stdout, want) || stderr != "" {
				t.Errorf("%v: exit code %d, stdout %q, stderr %q; want %q", args, code, stdout, stderr, want)
			}
		}
	}
	if !strings.Contains(overview, verbs()[0].help+"; the default\n") || verbs()[0].name != "serve" {
		t.Errorf("derpd help names another default than serve:\n%s", overview)
	}
	for command, flag := range map[string]string{"derpmap": "--format FORMAT", "pin": "--rotate", "env": "--example"} {
		if stdout, _, _ := execute(t, env, command, "--help"); !strings.Contains(stdout, "\nflags:\n") || !strings.Contains(stdout, "\n  "+flag+"\n") {
			t.Errorf("the help of %s lacks %s:\n%s", command, flag, stdout)
		}
	}
}

// TestUsageErrors asserts that a command line that can never work ends with exit
// code 2 and says why.
func TestUsageErrors(t *testing.T) {
	env := testkit.Environ(t, "DERP_CERT_MODE=off", "DERP_DOMAIN=derp.example.com")
	for want, args := range map[string][]string{
		`derpd: unknown command "sevre"` + "\n\nusage: derpd":                     {"sevre"},
		`derpd: unknown command "sevre"`:                                          {"help", "sevre"},
		"serve: unexpected argument \"now\"; see `derpd serve --help`":            {"serve", "now"},
		"admit: want NODEKEY; see `derpd admit --help`":                           {"admit"},
		"admit: unexpected argument \"b\"; see":                                   {"admit", "a", "b"},
		"help: unexpected argument \"env\"; see":                                  {"help", "pin", "env"},
		"env: flag provided but not defined: -sample; see `derpd env --help`":     {"env", "--sample"},
		`derpmap: invalid value "xml" for flag -format: want one of policy, head`: {"derpmap", "--format", "xml"},
		"pin: DERP_CERT_MODE is off, so there is no pinned certificate":           {"pin"},
		"derpd: pin: DERP_CERT_MODE is off, so":                                   {"pin", "--rotate"},
		"pin: want --rotate or --accept, got both":                                {"pin", "--rotate", "--accept"},
		`pin: unexpected argument "0123"; only --accept has one`:                  {"pin", "0123"},
		`pin: unexpected argument "b"; see`:                                       {"pin", "--accept", "a", "b"},
		`pin: invalid value "xml" for flag -format: want one of policy, head`:     {"pin", "--accept", "--format", "xml"},
	} {
		stdout, stderr, code := execute(t, env, args...)
		if code != 2 || stdout != "" || !strings.Contains(stderr, want) {
			t.Errorf("%v: exit code %d, stdout %q, stderr %q; want %q", args, code, stdout, stderr, want)
		}
	}
	bad := append(env, "DERP_REGION_ID=7")
	for _, args := range [][]string{nil, {"serve"}, {"derpmap"}, {"pin"}, {"env"}} {
		if _, stderr, code := execute(t, bad, args...); code != 2 || !strings.Contains(stderr, "DERP_REGION_ID: want a number") {
			t.Errorf("%v in a bad environment: exit code %d, %s", args, code, stderr)
		}
	}
}

// TestPin asserts what the pin command prints: the pin of the certificate in use
// and its last day, and after a rotation the map with the new pin.
func TestPin(t *testing.T) {
	env := testkit.Environ(t)
	if _, stderr, code := execute(t, env, "pin"); code != 1 || stderr == "" {
		t.Errorf("before the first start: exit code %d, %q", code, stderr)
	}
	text, stderr, code := execute(t, env, "pin", "--rotate")
	// The policy is the default format.
	if code != 0 || !strings.Contains(text, `"derpMap": `) {
		t.Fatalf("exit code %d, stderr %q, stdout\n%s", code, stderr, text)
	}
	last := time.Now().AddDate(10, 0, 0).UTC().Format(time.DateOnly)
	first, stderr, code := execute(t, env, "pin")
	pin, _, _ := strings.Cut(first, " ")
	if code != 0 || first != fmt.Sprintf("%s until %s\n", pin, last) || !strings.Contains(text, `"CertName": "`+pin+`"`) {
		t.Errorf("exit code %d, stderr %q, stdout %q; want until %s, and the pin in\n%s", code, stderr, first, last, text)
	}
	if text, _, _ = execute(t, env, "pin", "--rotate", "--format", "json"); strings.Contains(text, pin) || strings.Contains(text, "derpMap") {
		t.Errorf("a second rotation prints\n%s\nwant JSON with another pin than %s", text, pin)
	}
}
