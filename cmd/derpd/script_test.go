package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"derpd/cmd/derpd/internal/admin"
	"derpd/internal/testkit"
)

// TestScripts runs the scripts in testdata, which start the program as an
// operator does.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			for i := 1; i <= 4; i++ {
				env.Setenv(fmt.Sprintf("PORT%d", i), strconv.Itoa(testkit.FreePort(t)))
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"waitready":  waitReady,
			"waithealth": waitHealth,
			// selfsigned CERT KEY NAME makes a self-signed certificate.
			"selfsigned": func(ts *testscript.TestScript, _ bool, args []string) {
				testkit.WritePair(t, ts.MkAbs(args[0]), ts.MkAbs(args[1]), testkit.SelfSigned(t, args[2]))
			},
		},
	})
}

// waitHealth is the command waithealth TEXT: it waits until the health of the script's
// relay has a text.
func waitHealth(ts *testscript.TestScript, _ bool, args []string) {
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
	defer cancel()
	if err := testkit.Retry(ctx, func(ctx context.Context) error {
		report, _, err := admin.Client{Addr: ts.Getenv("DERP_ADMIN_ADDR")}.Ready(ctx)
		if err == nil && !strings.Contains(report, args[0]) {
			err = errors.New(report)
		}
		return err
	}); err != nil {
		ts.Fatalf("health lacks %q after %v: %v", args[0], testkit.Patience, err)
	}
}

// waitReady is the command waitready: it waits until the script's relay is
// ready.
func waitReady(ts *testscript.TestScript, _ bool, _ []string) {
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
	defer cancel()
	if err := testkit.Retry(ctx, func(ctx context.Context) error {
		report, ready, err := admin.Client{Addr: ts.Getenv("DERP_ADMIN_ADDR")}.Ready(ctx)
		if err == nil && !ready {
			err = errors.New(report)
		}
		return err
	}); err != nil {
		ts.Fatalf("the relay is not ready after %v: %v", testkit.Patience, err)
	}
}

// asNobody runs derpd as a user without privileges: as uid 65532 if the tests
// run as root, else as the user of the tests.
func asNobody(t *testing.T, dir string, args []string, env ...string) (stderr string, code int) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	binary, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	// Other users cannot reach the directory of the test binary. Under the
	// name derpd the copy runs the program instead of the tests.
	derpd := filepath.Join(dir, "derpd")
	if err := os.WriteFile(derpd, binary, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, derpd, args...)
	cmd.Env = env
	if os.Getuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65532, Gid: 65532}}
	}
	var out strings.Builder
	cmd.Stderr = &out
	_ = cmd.Run()
	return strings.TrimSpace(out.String()), cmd.ProcessState.ExitCode()
}

// TestWithoutPrivileges asserts the messages for files and ports that the
// container's user may not use.
func TestWithoutPrivileges(t *testing.T) {
	dir, err := os.MkdirTemp("", "derpd-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	uid := os.Getuid()
	if uid == 0 {
		uid = 65532
	}
	data, locked := filepath.Join(dir, "data"), filepath.Join(dir, "locked")
	for _, d := range []string{data, locked} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(data, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(locked, 0o555); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("x"), 0o000); err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(dir, "keyed")
	if err := os.Mkdir(key, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(key, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(key, "node.key"), []byte("{}"), 0o000); err != nil {
		t.Fatal(err)
	}
	free := []string{"DERP_ADDR=127.0.0.1:0", "DERP_HTTP_PORT=-1", "DERP_STUN=false", "DERP_ADMIN_ADDR=127.0.0.1:0", "DERP_DISCOVERY=off"}

	for _, tt := range []struct {
		name string
		env  []string
		want string
	}{
		{
			"a directory of somebody else",
			[]string{"DERP_DATA_DIR=" + locked},
			fmt.Sprintf("DERP_DATA_DIR: %s cannot be written to by uid %d: permission denied; on the host: chown -R %d DIRECTORY, or use a named volume", locked, uid, uid),
		},
		{
			"a secret of somebody else",
			[]string{"DERP_DATA_DIR=" + data, "DERP_REGION_NAME_FILE=" + secret},
			fmt.Sprintf("DERP_REGION_NAME_FILE: open %s: permission denied; derpd runs as uid %d, which must be able to read it (a secret with mode 0600 that root owns cannot be)", secret, uid),
		},
		{
			"a node key of somebody else",
			[]string{"DERP_DATA_DIR=" + key},
			fmt.Sprintf("DERP_DATA_DIR: reading node key: open %s/node.key: permission denied; derpd runs as uid %d, which must be able to read it (a secret with mode 0600 that root owns cannot be)", key, uid),
		},
		{
			"a port below 1024",
			[]string{"DERP_DATA_DIR=" + data, "DERP_ADDR=127.0.0.1:443"},
			fmt.Sprintf("DERP_ADDR: listening on 127.0.0.1:443: bind: permission denied; uid %d may not listen below port 1024 here: choose ports from 1024 on, or allow it on the host with sysctl net.ipv4.ip_unprivileged_port_start=80 (containers on Docker's bridge network may)", uid),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if strings.Contains(tt.name, "port") && unprivilegedPortStart(t) < 1024 {
				t.Skip("every user may listen below port 1024 here")
			}
			stderr, code := asNobody(t, dir, nil, testkit.LastOfEach(append(free, tt.env...))...)
			if want := "derpd: not started, nothing was changed: " + tt.want; stderr != want || code != exitUsage {
				t.Errorf("exit code %d\ngot  %s\nwant %s", code, stderr, want)
			}
		})
	}
}

// unprivilegedPortStart is the first port that every user may listen on.
func unprivilegedPortStart(t *testing.T) int {
	t.Helper()
	data, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		t.Fatal(err)
	}
	var port int
	if _, err := fmt.Sscan(string(data), &port); err != nil {
		t.Fatal(err)
	}
	return port
}

// TestManualFilesAreOnlyRead uses a certificate directory that derpd may read
// but not write.
func TestManualFilesAreOnlyRead(t *testing.T) {
	dir, err := os.MkdirTemp("", "derpd-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	data, certdir := filepath.Join(dir, "data"), filepath.Join(dir, "certs")
	for _, d := range []string{data, certdir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	testkit.WritePair(t, filepath.Join(certdir, "derp.example.com.crt"), filepath.Join(certdir, "derp.example.com.key"), testkit.SelfSigned(t, "derp.example.com"))
	for path, mode := range map[string]os.FileMode{
		dir: 0o755, data: 0o777, certdir: 0o555,
		filepath.Join(certdir, "derp.example.com.crt"): 0o444, filepath.Join(certdir, "derp.example.com.key"): 0o444,
	} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	stderr, code := asNobody(t, dir, []string{"env"}, "DERP_DATA_DIR="+data, "DERP_CERT_DIR="+certdir, "DERP_CERT_MODE=manual", "DERP_DOMAIN=derp.example.com")
	if code != exitOK {
		t.Error(fmt.Sprint("exit code ", code, ": "), stderr)
	}
}
