package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"tailscale.com/derp/derphttp"

	"derpd/certs/acmetest"
)

// shown is the certificate that a client gets and verifies.
func shown(t *testing.T, n *testNode, name string, roots *x509.CertPool) *x509.Certificate {
	t.Helper()
	dialer := &tls.Dialer{Config: &tls.Config{ServerName: name, RootCAs: roots, MinVersion: tls.VersionTLS12}}
	conn, err := dialer.DialContext(t.Context(), "tcp", n.listeners.https.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0]
}

// A renewal reaches new connections, and leaves those that are there alone.
func TestRenewalWithClientsConnected(t *testing.T) {
	const clients = 50
	authority := acmetest.Start(t)
	authority.Validity = 30 * time.Second
	c, err := loadConfig(loopbackEnv(t, "DERP_DOMAIN=renewal.example.com", "DERP_ACME_CA="+authority.Directory, "DERP_ACME_CA_ROOTS="+authority.RootsFile))
	if err != nil {
		t.Fatal(err)
	}
	c.acme.CheckEvery = 200 * time.Millisecond
	n := beginConfig(t, c, func(n *node) {
		authority.Validate(t, port(n.listeners.http.Addr()), port(n.listeners.https.Addr()))
	})
	roots := authority.Roots()
	r := region(t, parsePolicy(t, n.printed))

	list := make([]*derphttp.Client, clients)
	from := make([]netip.AddrPort, clients)
	for i := range list {
		list[i] = newClient(t, r)
		list[i].TLSConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
		if err := admitted(t, list[i]); err != nil {
			t.Fatal(err)
		}
		if from[i], err = list[i].LocalAddr(); err != nil {
			t.Fatal(err)
		}
	}
	before := shown(t, n, "renewal.example.com", roots)
	renewals := n.certs.Status().Reloads

	until(t, "there is another certificate", func() bool {
		s := n.certs.Status()
		return s.Reloads > renewals && !s.Leaf.Equal(before)
	})
	if shown(t, n, "renewal.example.com", roots).Equal(before) {
		t.Error("a new connection gets the old certificate")
	}
	for pair := range slices.Chunk(list, 2) {
		exchange(t, pair[0], pair[1], pair[0].SelfPublicKey(), pair[1].SelfPublicKey())
	}
	for i, client := range list {
		// A client that lost its connection dials again by itself.
		if now, err := client.LocalAddr(); err != nil || now != from[i] {
			t.Errorf("client %d was at %s, is at %s (%v)", i, from[i], now, err)
		}
	}
}

// A directory that takes nothing more, or has become read-only, costs the
// renewal and nothing else: the old certificate is served, and health says why.
func TestCertificatesCannotBeStored(t *testing.T) {
	for _, tt := range []struct {
		name        string
		spoil, mend func(data string) error
		want        string // in health; DIR is the data directory
		warning     string // of the configuration, or none
	}{
		{
			name:  "full",
			spoil: func(data string) error { return fill(filepath.Join(data, "rubbish")) },
			mend:  func(data string) error { return os.Remove(filepath.Join(data, "rubbish")) },
			want:  "certificates cannot be stored in DIR/certs: no space left on device; make room there; derpd tries again by itself",
		},
		{
			name:    "read-only",
			spoil:   func(data string) error { return unix.Mount("", data, "", unix.MS_REMOUNT|unix.MS_RDONLY, tmpfsSize) },
			mend:    func(data string) error { return unix.Mount("", data, "", unix.MS_REMOUNT, tmpfsSize) },
			want:    "certificates cannot be stored in DIR/certs: read-only file system; mount it for writing; derpd tries again by itself",
			warning: "DERP_DATA_DIR: DIR cannot be written to by uid 0: read-only file system; mount it for writing; the stored certificate is served, but IT CANNOT BE RENEWED",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			data := t.TempDir()
			if err := unix.Mount("tmpfs", data, "tmpfs", 0, tmpfsSize); err != nil {
				t.Skipf("mounting a small file system needs root: %v", err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(data, 0); err != nil {
					t.Error(err)
				}
			})
			authority := acmetest.Start(t)
			authority.Validity = 4 * time.Minute // so near its end, it is renewed at each start
			domain := tt.name + ".example.com"
			env := loopbackEnv(t, "DERP_DATA_DIR="+data, "DERP_DOMAIN="+domain, "DERP_HTTP_PORT="+acmetest.FreePort(t),
				"DERP_ACME_CHALLENGES=http", "DERP_ACME_CA="+authority.Directory, "DERP_ACME_CA_ROOTS="+authority.RootsFile)
			c, err := loadConfig(dedup(env))
			if err != nil {
				t.Fatal(err)
			}
			c.acme.CheckEvery = time.Second // it is not due yet
			n := beginConfig(t, c, func(n *node) { authority.Validate(t, port(n.listeners.http.Addr()), 1) })
			roots := authority.Roots()
			old, node := shown(t, n, domain, roots), n.relay.PublicKey()
			n.stop()

			if err := tt.spoil(data); err != nil {
				t.Fatal(err)
			}
			n = begin(t, env)
			if got, want := strings.Join(n.config.warnings, "\n"), strings.Replace(tt.warning, " DIR ", " "+data+" ", 1); got != want {
				t.Errorf("warned of %q, want %q", got, want)
			}
			want := strings.ReplaceAll(tt.want, "DIR", data)
			until(t, "health says the cause", func() bool { return strings.HasSuffix(n.checkCertificate(t.Context()).Detail, want) })
			if report := n.health.Report(t.Context()); !report.Ready {
				t.Errorf("not ready: %s", report)
			}
			if !shown(t, n, domain, roots).Equal(old) || n.relay.PublicKey() != node {
				t.Error("certificate or node key changed")
			}
			n.stop()

			if err := tt.mend(data); err != nil {
				t.Fatal(err)
			}
			// In another process, since certmagic's pauses after a failure
			// outlive the relay in this one.
			cmd := exec.CommandContext(t.Context(), derpdBinary(t))
			cmd.Env = dedup(env)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			until(t, "it is renewed", func() bool {
				files, _ := filepath.Glob(filepath.Join(data, "certs/certificates/*/*/*.crt"))
				if len(files) != 1 {
					return false
				}
				pair, err := tls.LoadX509KeyPair(files[0], files[0])
				return err == nil && !pair.Leaf.Equal(old)
			})
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
	}
}

// tmpfsSize is enough for a relay.
const tmpfsSize = "size=256k"

// until waits for what the message says.
func until(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline, tick := time.After(patience), time.NewTicker(20*time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-deadline:
			t.Fatalf("waited in vain until %s", what)
		case <-tick.C:
		}
	}
}

// fill takes all room that there is.
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
