// Package compat tests that an update can be taken back: this derpd and an earlier
// one run in turns on one data directory.
package compat

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
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

// firstVersion is the commit that wrote the first data directories in use.
const firstVersion = "5a698a09834e272f54fd4c392ad0e815ddec2aa5"

// This derpd and the last one before it run in turns on one data directory. Clients
// must find the same relay each time: its node key, its certificate, and, while the
// source of admission fails, the memory of admitted nodes.
func TestBothWays(t *testing.T) {
	history(t)
	old, current := buildAt(t, lastVersion(t)), build(t, root, "current")
	for name, turns := range map[string][]string{"update and back": {old, current, old}, "back and update": {current, old, current}} {
		t.Run(name, func(t *testing.T) {
			t.Run("pinned", func(t *testing.T) {
				source := newSource(t)
				same(t, serve(t, turns, append(environment(t), "DERP_HTTP_PORT=0", "DERP_VERIFY_CLIENT_URL="+source.URL), nil, source.fail))
			})
			t.Run("letsencrypt", func(t *testing.T) {
				authority := acmetest.Start(t)
				httpPort := testkit.FreePort(t)
				authority.Validate(t, httpPort, 1)
				// A certificate is obtained once: authorities limit their number.
				same(t, serve(t, turns, append(environment(t), "DERP_DOMAIN=compatible.example.com", "DERP_HTTP_PORT="+strconv.Itoa(httpPort),
					"DERP_ACME_CHALLENGES=http", "DERP_ACME_CA="+authority.Directory, "DERP_ACME_CA_ROOTS="+authority.RootsFile), authority.Roots(), func() {}))
			})
		})
	}
}

// lastVersion returns the last tag before this commit, or the first version.
func lastVersion(t *testing.T) string {
	t.Helper()
	if tag, err := git(t, "describe", "--tags", "--abbrev=0", "--match", "v[0-9]*", "HEAD^"); err == nil {
		return tag
	}
	return firstVersion
}

// source is an admission URL that admits every node until it fails.
type source struct {
	*httptest.Server
	failing atomic.Bool
}

func newSource(t *testing.T) *source {
	t.Helper()
	s := new(source)
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if s.failing.Load() {
			http.Error(w, "failing", http.StatusInternalServerError)
			return
		}
		_, _ = io.WriteString(w, `{"Allow":true}`)
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *source) fail() { s.failing.Store(true) }

// serve runs the binaries one after the other on one data directory, with the same two
// clients. It calls first after the first binary has stopped.
func serve(t *testing.T, binaries, env []string, roots *x509.CertPool, first func()) []identity {
	t.Helper()
	clients := [2]key.NodePrivate{key.NewNode(), key.NewNode()}
	var ran []identity
	for _, binary := range binaries {
		ran = append(ran, serveOnce(t, binary, env, roots, clients))
		if len(ran) == 1 {
			first()
		}
	}
	return ran
}

// same fails the test if clients met different relays.
func same(t *testing.T, ran []identity) {
	t.Helper()
	for i, again := range ran {
		if again != ran[0] {
			t.Errorf("relay was %+v in the first turn, is %+v in turn %d", ran[0], again, i+1)
		}
	}
}

// identity is what clients know about a relay.
type identity struct {
	nodeKey, certName string
	serial            string // serial number of the certificate
}

// serveOnce runs derpd until it has relayed a packet, and stops it.
func serveOnce(t *testing.T, binary string, env []string, roots *x509.CertPool, clients [2]key.NodePrivate) identity {
	t.Helper()
	var log bytes.Buffer
	relay := exec.CommandContext(t.Context(), binary)
	relay.Env, relay.Stderr = env, &log
	begun := time.Now()
	if err := relay.Start(); err != nil {
		t.Fatal(err)
	}
	var result error
	ended := make(chan struct{}) // closed when result is set and log is complete
	go func() {
		defer close(ended)
		result = relay.Wait()
	}()
	defer func() {
		_ = relay.Process.Kill() // no effect after a stop
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
	found := exchange(t, m.Regions[900], roots, clients)

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
		t.Fatalf("%s did not stop within %v", binary, stopWithin)
	}
	t.Logf("%s: ready after %v, stopped within %v", filepath.Base(binary), ready.Round(time.Millisecond), time.Since(asked).Round(time.Millisecond))
	return found
}

// exchange passes packets between two clients that verify the certificate, and
// returns the identity of the relay that they saw.
func exchange(t *testing.T, region *tailcfg.DERPRegion, roots *x509.CertPool, clients [2]key.NodePrivate) identity {
	t.Helper()
	from, to := testkit.RegionClient(t, region, clients[0]), testkit.RegionClient(t, region, clients[1])
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

// environment returns that of a relay on loopback with a new data directory.
func environment(t *testing.T) []string {
	t.Helper()
	return []string{
		"DERP_ADDR=" + testkit.FreeAddr(t), "DERP_ADMIN_ADDR=" + testkit.FreeAddr(t), "DERP_STUN_PORT=0",
		"DERP_DATA_DIR=" + t.TempDir(), "DERP_DISCOVERY=off", "DERP_TAILSCALED_SOCKET=/nonexistent/tailscaled.sock",
		"DERP_PUBLIC_IPV4=127.0.0.1", "DERP_PUBLIC_IPV6=none",
	}
}

// history skips a test where git's history is missing: in an archive of the sources
// and in a shallow clone. In a full clone, a missing commit is a failure.
func history(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("git is not installed, so no earlier derpd can be built; install git")
	}
	if _, err := os.Stat(filepath.Join(root, ".git")); err != nil {
		t.Skip("no earlier derpd can be built: the sources are not a git repository; use a clone")
	}
	shallow, err := git(t, "rev-parse", "--is-shallow-repository")
	if err != nil {
		t.Fatal(err)
	}
	if shallow == "true" {
		t.Skip("no earlier derpd can be built: this clone has no history; run git fetch --unshallow")
	}
}

func git(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", args...)
	cmd.Dir = root
	out, err := cmd.Output()
	return strings.TrimSpace(string(out)), err
}

// buildAt builds derpd from an earlier commit.
func buildAt(t *testing.T, commit string) string {
	t.Helper()
	dir := t.TempDir()
	archive := filepath.Join(dir, "sources.tar")
	run(t, root, "git", "archive", "--output", archive, commit)
	run(t, dir, "tar", "--extract", "--file", archive)
	return build(t, dir, commit)
}

// build builds as `make build` does, so that both share cached packages.
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
