// Package compat tests that derpd and earlier versions can take turns on one data
// directory, so that an update can be undone.
package compat

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
	"derpd/internal/testkit/acmetest"
)

// root is the directory of the repository.
var root = filepath.Join("..", "..")

const stopWithin = 10 * time.Second

// Earlier commits that can read the data of derpd, and derpd theirs. They differ
// in how they store a certificate.
const (
	commitApart    = "12aa3246098517347968f26df2dc526520c3d8c0" // certificate and key in two files
	commitTogether = "15a40d1707176fda8517e70d3c955fe9a184d5c2" // certificate and key in one file
)

// TestBothWays runs derpd and an earlier version in turns on one data directory.
// The node key and the certificate, which clients know, stay the same.
func TestBothWays(t *testing.T) {
	history(t)
	commits := map[string]string{"files apart": commitApart, "one file": commitTogether}
	// HEAD^ skips the tag of the current commit.
	if tag, err := git(t, "describe", "--tags", "--abbrev=0", "--match", "v[0-9]*", "HEAD^"); err == nil {
		commits[tag] = tag
	}
	current := build(t, root, "current")
	for name, commit := range commits {
		old := buildAt(t, commit)
		for from, turns := range map[string][]string{"from old to new": {old, current, old, current}, "and back": {current, old, current, old}} {
			t.Run(name+" "+from, func(t *testing.T) {
				t.Run("pinned", func(t *testing.T) {
					env := append(environment(t), "DERP_HTTP_PORT=0")
					ran := serve(t, turns, env, nil)
					for _, again := range ran {
						if again != ran[0] {
							t.Errorf("relay was %+v, is %+v", ran[0], again)
						}
					}
				})
				t.Run("letsencrypt", func(t *testing.T) {
					authority := acmetest.Start(t)
					httpPort := testkit.FreePort(t)
					authority.Validate(t, httpPort, 1)
					ran := serve(t, turns, append(environment(t), "DERP_DOMAIN=compatible.example.com", "DERP_HTTP_PORT="+strconv.Itoa(httpPort),
						"DERP_ACME_CHALLENGES=http", "DERP_ACME_CA="+authority.Directory, "DERP_ACME_CA_ROOTS="+authority.RootsFile), authority.Roots())
					// A version obtains a certificate only if its own layout
					// holds none: authorities limit the number.
					if ran[2] != ran[0] || ran[3] != ran[1] {
						t.Errorf("a version lost its key or certificate: %+v", ran)
					}
					if ran[1].nodeKey != ran[0].nodeKey {
						t.Errorf("node key was %s, is %s", ran[0].nodeKey, ran[1].nodeKey)
					}
					if commit != commitApart && ran[1] != ran[0] {
						t.Errorf("the versions do not share one certificate: %+v", ran[:2])
					}
				})
			})
		}
	}
}

// serve runs the programs one after the other on one data directory.
func serve(t *testing.T, binaries, env []string, roots *x509.CertPool) []identity {
	t.Helper()
	var ran []identity
	for _, binary := range binaries {
		ran = append(ran, serveOnce(t, binary, env, roots))
	}
	return ran
}

// identity is the part of a relay that clients know.
type identity struct {
	nodeKey, certName string
	serial            string // serial number of the certificate
}

// serveOnce runs derpd until two clients have exchanged packets, and stops it.
func serveOnce(t *testing.T, binary string, env []string, roots *x509.CertPool) identity {
	t.Helper()
	var log bytes.Buffer
	relay := exec.CommandContext(t.Context(), binary)
	relay.Env, relay.Stderr = env, &log
	begun := time.Now()
	if err := relay.Start(); err != nil {
		t.Fatal(err)
	}
	var result error
	ended := make(chan struct{}) // closed when result is set and the log is complete
	go func() {
		defer close(ended)
		result = relay.Wait()
	}()
	defer func() {
		_ = relay.Process.Kill() // no effect after the regular stop
		<-ended
		if t.Failed() {
			t.Logf("%s:\n%s", binary, log.String())
		}
	}()
	// healthcheck and derpmap ask the running relay.
	testkit.Wait(t, binary+" to be ready", func(ctx context.Context) error {
		health := exec.CommandContext(ctx, binary, "healthcheck")
		health.Env = env
		out, err := health.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	ready := time.Since(begun)

	derpmap := exec.CommandContext(t.Context(), binary, "derpmap", "--format", "json")
	derpmap.Env = env
	text, err := derpmap.Output()
	if err != nil {
		t.Fatal(err)
	}
	var m tailcfg.DERPMap
	if err := json.Unmarshal(text, &m); err != nil || m.Regions[900] == nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	found := exchange(t, m.Regions[900], roots)

	asked := time.Now()
	if err := relay.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
		if result != nil {
			t.Errorf("%s ended with %v", binary, result)
		}
	case <-time.After(stopWithin):
		t.Fatalf("%s does not stop", binary)
	}
	t.Logf("%s: ready after %v, stopped within %v", filepath.Base(binary), ready.Round(time.Millisecond), time.Since(asked).Round(time.Millisecond))
	return found
}

// exchange passes packets between two clients that verify the certificate, and
// returns the identity of the relay that they saw.
func exchange(t *testing.T, region *tailcfg.DERPRegion, roots *x509.CertPool) identity {
	t.Helper()
	from, to := testkit.RegionClient(t, region, key.NewNode()), testkit.RegionClient(t, region, key.NewNode())
	if roots != nil {
		from.TLSConfig, to.TLSConfig = testkit.Trust(roots), testkit.Trust(roots)
	}
	defer func() { _, _ = from.Close(), to.Close() }() // before the relay stops
	testkit.Exchange(t, from, to)
	state, ok := from.TLSConnectionState()
	if !ok {
		t.Fatal("no TLS")
	}
	return identity{from.ServerPublicKey().String(), region.Nodes[0].CertName, state.PeerCertificates[0].SerialNumber.String()}
}

// environment is the environment of a relay on loopback with a fresh data
// directory.
func environment(t *testing.T) []string {
	t.Helper()
	return []string{
		"DERP_ADDR=" + testkit.FreeAddr(t), "DERP_ADMIN_ADDR=" + testkit.FreeAddr(t), "DERP_STUN_PORT=0",
		"DERP_DATA_DIR=" + t.TempDir(), "DERP_DISCOVERY=off", "DERP_TAILSCALED_SOCKET=/nonexistent/tailscaled.sock",
		"DERP_PUBLIC_IPV4=127.0.0.1", "DERP_PUBLIC_IPV6=none",
	}
}

// history skips the test in an archive of the sources and in a shallow clone,
// which have no earlier commits. Elsewhere a missing commit fails the test.
func history(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("no git on this machine, so no earlier derpd to build")
	}
	if _, err := os.Stat(filepath.Join(root, ".git")); err != nil {
		t.Skip("no earlier derpd to build: this is not a clone of the repository")
	}
	shallow, err := git(t, "rev-parse", "--is-shallow-repository")
	if err != nil {
		t.Fatal(err)
	}
	if shallow == "true" {
		t.Skip("no earlier derpd to build: this clone has no history; git fetch --unshallow")
	}
}

func git(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", args...)
	cmd.Dir = root
	out, err := cmd.Output()
	return strings.TrimSpace(string(out)), err
}

// buildAt builds derpd as it was at a commit.
func buildAt(t *testing.T, commit string) string {
	t.Helper()
	dir := t.TempDir()
	archive := filepath.Join(dir, "sources.tar")
	run(t, root, "git", "archive", "--output", archive, commit)
	run(t, dir, "tar", "--extract", "--file", archive)
	return build(t, dir, commit)
}

// build builds with the flags of `make build`, so that both share Go's cache.
func build(t *testing.T, dir, name string) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "derpd-"+name)
	begun := time.Now()
	run(t, dir, "env", "CGO_ENABLED=0", "go", "build", "-trimpath", "-ldflags", "-s -w -buildid=", "-o", binary, "./cmd/derpd")
	t.Logf("built %s in %v", filepath.Base(binary), time.Since(begun).Round(time.Second))
	return binary
}

func run(t *testing.T, dir, program string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, out)
	}
}
