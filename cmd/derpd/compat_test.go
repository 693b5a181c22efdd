package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"tailscale.com/derp/derphttp"
	"tailscale.com/tailcfg"

	"derpd/certs/acmetest"
)

// Earlier commits with whose data derpd must get along, and they with its.
const (
	commitApart    = "12aa3246098517347968f26df2dc526520c3d8c0" // certificate and key are files of their own
	commitTogether = "15a40d1707176fda8517e70d3c955fe9a184d5c2" // and one file
)

// An update may be taken back: new and old derpd take turns on one data
// directory, and whatever a client knows of the relay stays as it is.
func TestCompatibleBothWays(t *testing.T) {
	history(t)
	commits := map[string]string{"files apart": commitApart, "one file": commitTogether}
	// Not the tag of this very commit.
	if tag, err := git(t, "describe", "--tags", "--abbrev=0", "--match", "v[0-9]*", "HEAD^"); err == nil {
		commits[tag] = tag
	}
	current := derpdBinary(t)
	for name, commit := range commits {
		old := derpdAt(t, commit)
		t.Run(name, func(t *testing.T) {
			t.Run("pinned", func(t *testing.T) {
				env := subprocessEnv(t)
				first := serveOnce(t, current, env, nil)
				for _, binary := range []string{old, current, old} {
					if again := serveOnce(t, binary, env, nil); again != first {
						t.Errorf("relay was %+v, is %+v", first, again)
					}
				}
			})
			t.Run("letsencrypt", func(t *testing.T) {
				authority := acmetest.Start(t)
				httpPort := acmetest.FreePort(t)
				number, err := strconv.Atoi(httpPort)
				if err != nil {
					t.Fatal(err)
				}
				authority.Validate(t, number, 1)
				env := append(subprocessEnv(t), "DERP_DOMAIN=compatible.example.com", "DERP_HTTP_PORT="+httpPort,
					"DERP_ACME_CHALLENGES=http", "DERP_ACME_CA="+authority.Directory, "DERP_ACME_CA_ROOTS="+authority.RootsFile)
				var ran []identity
				for _, binary := range []string{current, old, current, old} {
					ran = append(ran, serveOnce(t, binary, env, authority.Roots()))
				}
				// Each obtains a certificate where it finds none in its own
				// layout, and never a second one: authorities count.
				if ran[2] != ran[0] || ran[3] != ran[1] {
					t.Errorf("one of them lost something: %+v", ran)
				}
				if ran[1].nodeKey != ran[0].nodeKey {
					t.Errorf("node key was %s, is %s", ran[0].nodeKey, ran[1].nodeKey)
				}
				if commit != commitApart && ran[1] != ran[0] {
					t.Errorf("one certificate does not do for both: %+v", ran[:2])
				}
			})
		})
	}
}

// identity is what clients know of a relay.
type identity struct {
	nodeKey, certName string
	serial            string // of the certificate
}

// serveOnce runs derpd until packets went through it, and stops it.
func serveOnce(t *testing.T, binary string, env []string, roots *x509.CertPool) identity {
	t.Helper()
	env = dedup(env)
	var log bytes.Buffer
	cmd := exec.CommandContext(t.Context(), binary)
	cmd.Env, cmd.Stderr = env, &log
	begun := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	stopped := false
	defer func() {
		if !stopped {
			_ = cmd.Process.Kill()
			<-ended
			t.Logf("%s:\n%s", binary, log.String())
		}
	}()

	admin := valueOf(t, env, "DERP_ADMIN_ADDR")
	eventually(t, binary+" is ready", func() bool {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+admin+"/readyz", nil)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := http.DefaultClient.Do(request)
		if err != nil {
			return false
		}
		_ = answer.Body.Close()
		return answer.StatusCode == http.StatusOK
	})
	ready := time.Since(begun)

	printed := exec.CommandContext(t.Context(), binary, "derpmap", "--format", "json")
	printed.Env = env
	text, err := printed.Output()
	if err != nil {
		t.Fatal(err)
	}
	var m tailcfg.DERPMap
	if err := json.Unmarshal(text, &m); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	r := region(t, &m)
	a, _ := exchangeOver(t, r, func(c *derphttp.Client) {
		if roots != nil {
			c.TLSConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
		}
	})
	state, ok := a.TLSConnectionState()
	if !ok {
		t.Fatal("no TLS")
	}

	asked := time.Now()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		stopped = true
		if err != nil {
			t.Errorf("%s ended with %v:\n%s", binary, err, log.String())
		}
	case <-time.After(patience):
		t.Fatalf("%s does not stop", binary)
	}
	t.Logf("ready after %s, stopped within %s", ready.Round(time.Millisecond), time.Since(asked).Round(time.Millisecond))
	return identity{a.ServerPublicKey().String(), r.Nodes[0].CertName, state.PeerCertificates[0].SerialNumber.String()}
}

// subprocessEnv is loopbackEnv with ports that are known from outside.
func subprocessEnv(t *testing.T) []string {
	t.Helper()
	return loopbackEnv(t, "DERP_ADDR=127.0.0.1:"+acmetest.FreePort(t), "DERP_ADMIN_ADDR=127.0.0.1:"+acmetest.FreePort(t))
}

func valueOf(t *testing.T, env []string, name string) string {
	t.Helper()
	i := slices.IndexFunc(env, func(pair string) bool { return strings.HasPrefix(pair, name+"=") })
	if i < 0 {
		t.Fatalf("%s is not set", name)
	}
	return env[i][len(name)+1:]
}

// history skips a test where there is none: in an archive of the sources, and in
// a shallow clone. Elsewhere a commit that is missing is a failure.
func history(t *testing.T) {
	t.Helper()
	program(t, "git")
	if _, err := os.Stat(repository(".git")); err != nil {
		t.Skip("no history here, so no earlier derpd to build: this is not a clone of the repository")
	}
	shallow, err := git(t, "rev-parse", "--is-shallow-repository")
	if err != nil {
		t.Fatal(err)
	}
	if shallow == "true" {
		t.Skip("no history here, so no earlier derpd to build: this clone is shallow (git fetch --unshallow)")
	}
}

func git(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", args...)
	cmd.Dir = repository()
	out, err := cmd.Output()
	return strings.TrimSpace(string(out)), err
}

// derpdAt builds derpd as it was at a commit.
func derpdAt(t *testing.T, commit string) string {
	t.Helper()
	dir, binary := t.TempDir(), filepath.Join(t.TempDir(), "derpd-"+commit)
	archive := filepath.Join(dir, "sources.tar")
	output(t, repository(), nil, "git", "archive", "--output", archive, commit)
	output(t, dir, nil, "tar", "--extract", "--file", archive)
	begun := time.Now()
	output(t, dir, []string{"CGO_ENABLED=0"}, "go", "build", "-trimpath", "-o", binary, "./cmd/derpd")
	t.Logf("built derpd at %s in %s", commit, time.Since(begun).Round(time.Second))
	return binary
}
