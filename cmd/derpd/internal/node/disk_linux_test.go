package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"derpd/certs"
	"derpd/cmd/derpd/internal/config"
	"derpd/internal/testkit"
	"derpd/internal/testkit/acmetest"
	"derpd/relay"
)

// TestCertificatesCannotBeStored fills the data directory, or makes it
// read-only, before a renewal. The relay serves the old certificate, and health
// reports the cause.
func TestCertificatesCannotBeStored(t *testing.T) {
	for _, tt := range []struct {
		name          string
		spoil, repair func(data string) error
		want          string // end of health's detail; $D is the data directory
		warning       string // warning of the configuration; empty for none
	}{
		{
			name:   "full",
			spoil:  func(data string) error { return fill(filepath.Join(data, "rubbish")) },
			repair: func(data string) error { return os.Remove(filepath.Join(data, "rubbish")) },
			want:   "certificates cannot be stored in $D/certs: no space left on device; make room there; derpd tries again by itself",
		},
		{
			name:    "read-only",
			spoil:   makeReadOnly,
			repair:  func(data string) error { return unix.Mount("", data, "", unix.MS_REMOUNT, tmpfsSize) },
			want:    "certificates cannot be stored in $D/certs: read-only file system; mount it for writing; derpd tries again by itself",
			warning: "DERP_DATA_DIR: $D cannot be written to by uid 0: read-only file system; mount it for writing; the stored certificate is served, but cannot be renewed",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			data := smallDisk(t)
			authority := acmetest.Start(t)
			authority.Validity = 4 * time.Minute // so near its end, certmagic renews a certificate at each start
			domain := freshName(tt.name)
			httpPort := testkit.FreePort(t)
			env := testkit.Environ(t, "DERP_DATA_DIR="+data, "DERP_DOMAIN="+domain, "DERP_HTTP_PORT="+strconv.Itoa(httpPort),
				"DERP_ACME_CHALLENGES=http", "DERP_ACME_CA="+authority.Directory, "DERP_ACME_CA_ROOTS="+authority.RootsFile)
			authority.Validate(t, httpPort, 1)
			inAnotherProcess(t, env, "there is a certificate", func() bool { return stored(data) != nil })
			roots, old := authority.Roots(), stored(data)
			private, err := relay.LoadKey(filepath.Join(data, "node.key"))
			if err != nil {
				t.Fatal(err)
			}

			if err := tt.spoil(data); err != nil {
				t.Fatal(err)
			}
			n := begin(t, env)
			if got, want := strings.Join(n.config.Warnings, "\n"), strings.ReplaceAll(tt.warning, "$D", data); got != want {
				t.Errorf("warned of %q, want %q", got, want)
			}
			want := strings.ReplaceAll(tt.want, "$D", data)
			testkit.Until(t, "health says the cause", func() bool { return strings.HasSuffix(n.checkCertificate(t.Context()).Detail, want) })
			if report := n.health.Report(t.Context()); !report.Ready {
				t.Errorf("not ready: %s", report)
			}
			if !shown(t, n, domain, roots).Equal(old) || n.relay.PublicKey() != private.Public() {
				t.Error("certificate or node key changed")
			}
			n.stop()

			if err := tt.repair(data); err != nil {
				t.Fatal(err)
			}
			inAnotherProcess(t, env, "it is renewed", func() bool {
				now := stored(data)
				return now != nil && !now.Equal(old)
			})
		})
	}
}

// inAnotherProcess runs derpd until a condition holds. In the test's own
// process certmagic's pause after a failed renewal would delay the next relay.
func inAnotherProcess(t *testing.T, env []string, what string, holds func() bool) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), testkit.LinkAsDerpd(t))
	cmd.Env = testkit.LastOfEach(env)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	testkit.Until(t, what, holds)
}

// stored returns the certificate in a data directory, or nil.
func stored(data string) *x509.Certificate {
	files, _ := filepath.Glob(filepath.Join(data, "certs/certificates/*/*/*.pem"))
	if len(files) != 1 {
		return nil
	}
	pair, err := tls.LoadX509KeyPair(files[0], files[0])
	if err != nil {
		return nil
	}
	return pair.Leaf
}

// TestDiskFullAtTheFirstStart makes room on a full disk after the relay has
// failed to store its first certificate. The relay then obtains one without a
// restart.
func TestDiskFullAtTheFirstStart(t *testing.T) {
	data := smallDisk(t)
	rubbish := filepath.Join(data, "rubbish")
	authority := acmetest.Start(t)
	said := make(chan string, 1)
	begin(t, testkit.Environ(t, "DERP_DATA_DIR="+data, "DERP_DOMAIN=first.example.com",
		"DERP_ACME_CHALLENGES=http", "DERP_ACME_CA="+authority.Directory, "DERP_ACME_CA_ROOTS="+authority.RootsFile), func(n *Node) {
		if err := fill(rubbish); err != nil {
			t.Fatal(err)
		}
		authority.Validate(t, port(n.listeners.http.Addr()), 1)
		go func() {
			_ = testkit.Retry(t.Context(), func(context.Context) error {
				err := n.certs.Status().Err
				if err == nil || errors.Is(err, certs.ErrNone) {
					return certs.ErrNone
				}
				said <- err.Error()
				return os.Remove(rubbish)
			})
		}()
	})
	if got, want := testkit.Receive(t, "the certificate is not stored", said), "certificates cannot be stored in "+data+"/certs: no space left on device; make room there"; !strings.HasPrefix(got, want) {
		t.Errorf("status %q, want %q", got, want)
	}
}

// tmpfsSize is the size of smallDisk, enough for the files of a relay.
const tmpfsSize = "size=256k"

// smallDisk mounts a small file system until the test ends.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, tmpfsSize); err != nil {
		t.Skipf("mounting a small file system needs root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func makeReadOnly(dir string) error {
	return unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, tmpfsSize)
}

// TestReadOnlyDirectory starts relays on a read-only data directory. The start
// is refused unless the directory holds every file that the relay needs.
func TestReadOnlyDirectory(t *testing.T) {
	const refused = "DERP_DATA_DIR: $D cannot be written to by uid 0: read-only file system; mount it for writing"
	nodeKey := func(t *testing.T, dir string) {
		t.Helper()
		if _, err := relay.LoadOrCreateKey(filepath.Join(dir, "node.key")); err != nil {
			t.Fatal(err)
		}
	}
	pinned := func(t *testing.T, dir string) {
		t.Helper()
		nodeKey(t, dir)
		if err := certs.RotatePinned(certs.PinnedConfig{Path: filepath.Join(dir, "certs/pinned.pem"), Names: []string{"127.0.0.1"}}, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	manual := func(t *testing.T, dir string) {
		t.Helper()
		nodeKey(t, dir)
		pair("certs/derp.example.com", "derp.example.com", time.Now())(t, dir)
	}
	manualMode := []string{"DERP_CERT_MODE=manual", "DERP_DOMAIN=derp.example.com"}
	elsewhere := "DERP_DATA_DIR=" + t.TempDir()
	for _, tt := range []struct {
		name   string
		env    []string
		holds  setup
		starts bool
		warns  bool
	}{
		{name: "empty", holds: func(*testing.T, string) {}},
		{name: "no certificate to pin", holds: nodeKey},
		{name: "pinned", holds: pinned, starts: true, warns: true},
		{name: "pinned, no node key", holds: func(t *testing.T, dir string) {
			t.Helper()
			pinned(t, dir)
			if err := os.Remove(filepath.Join(dir, "node.key")); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "manual", env: manualMode, holds: manual, starts: true, warns: true},
		// derpd never writes to a DERP_CERT_DIR in mode manual.
		{name: "the directory of files", env: append([]string{elsewhere, "DERP_CERT_DIR=$D/certs"}, manualMode...), holds: manual, starts: true},
		{name: "off", env: []string{"DERP_CERT_MODE=off"}, holds: nodeKey, starts: true, warns: true},
		{name: "no certificate yet", env: []string{"DERP_DOMAIN=derp.example.com"}, holds: nodeKey},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := smallDisk(t)
			tt.holds(t, dir)
			if err := makeReadOnly(dir); err != nil {
				t.Fatal(err)
			}
			env := testkit.Environ(t, "DERP_DATA_DIR="+dir)
			for _, pair := range tt.env {
				env = append(env, strings.ReplaceAll(pair, "$D", dir))
			}
			message := strings.ReplaceAll(refused, "$D", dir)
			c, err := config.Load(testkit.LastOfEach(env))
			if !tt.starts {
				if err == nil || err.Error() != message {
					t.Errorf("got %v, want %s", err, message)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			if tt.warns {
				want = []string{message + "; derpd works with the files that are stored there"}
			}
			if !slices.Equal(c.Warnings, want) {
				t.Errorf("warned of %q, want %q", c.Warnings, want)
			}
			begin(t, env).stop()
		})
	}
}

// fill writes a file until the disk is full.
func fill(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	for err == nil {
		_, err = f.Write(make([]byte, 1024))
	}
	_ = f.Close()
	if !errors.Is(err, unix.ENOSPC) {
		return err
	}
	return nil
}
