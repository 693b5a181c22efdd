//go:build e2e

// Package e2e tests the image as operators run it: docker compose with the files of
// this repository, and Tailscale's own DERP and STUN clients outside. It uses the
// ports 443, 80 and 3478 of this machine, on which the Docker engine must run.
//
// DERPD_IMAGE names another image to test than the one that is built here.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"tailscale.com/net/stun"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

const (
	upTimeout     = 15 * time.Minute // includes a build of the image
	dockerTimeout = time.Minute
	peerTimeout   = 15 * time.Second
	silence       = 100 * time.Millisecond // without an answer of STUN
	stopWithin    = time.Second
)

// bridge is compose.yaml without any setting.
func bridge(t *testing.T, _ *row) {
	d := up(t, "-f", "compose.yaml")
	printed := d.derpMap(t)
	region := onlyRegion(t, printed)
	node := region.Nodes[0]
	hash, pinned := strings.CutPrefix(node.CertName, "sha256-raw:")
	if !pinned || len(hash) != 64 {
		t.Fatalf("map does not pin the certificate: CertName is %q", node.CertName)
	}
	if node.InsecureForTests {
		t.Error("map has InsecureForTests, with which clients do not verify the certificate")
	}
	published := reached(region, netip.MustParseAddr("127.0.0.1"))
	var relayKey key.NodePublic

	t.Run("relays by the map as printed", func(t *testing.T) {
		addr, err := netip.ParseAddr(node.IPv4)
		if err != nil {
			t.Fatalf("map has no address: IPv4 is %q", node.IPv4)
		}
		if !addr.IsPrivate() {
			t.Skip("the map has this machine's public address, which only other machines can dial")
		}
		relayKey = exchange(t, region)
	})
	t.Run("relays on the published port", func(t *testing.T) {
		relayKey = exchange(t, published)
	})
	t.Run("answers STUN with the client's address", func(t *testing.T) {
		addr := hostAddr(t)
		asked := netip.AddrPortFrom(addr, 3478)
		if got, local := askSTUN(t, asked); got != local {
			t.Errorf("STUN at %v answers %v, want the socket's address %v", asked, got, local)
		}
	})
	t.Run("does not answer STUN with the gateway's address", func(t *testing.T) {
		if checked := d.stunCheck(t); !strings.HasPrefix(checked, "ok ") {
			t.Errorf("health says %q", checked)
		}
		// Both addresses lead through the engine, which forwards this machine's
		// packets from the address of the bridge.
		bridge := d.inspect(t, "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")
		for i, addr := range []string{"127.0.0.1", bridge} {
			conn, err := dial(t, net.JoinHostPort(addr, "3478"))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Write(stun.Request(stun.NewTxID())); err != nil {
				t.Fatal(err)
			}
			refused := fmt.Sprintf("; %d requests refused", i+1)
			testkit.Until(t, "health counts the request to "+addr, func() bool {
				checked := d.stunCheck(t)
				return strings.HasPrefix(checked, "warn ") && strings.Contains(checked, refused) && strings.Contains(checked, "publish STUN on 0.0.0.0 only")
			})
			// The relay has received the request, so an answer would have arrived.
			if err := conn.SetReadDeadline(time.Now().Add(silence)); err != nil {
				t.Fatal(err)
			}
			if n, err := conn.Read(make([]byte, 1500)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: read %d bytes, error %v, want a timeout", addr, n, err)
			}
		}
		if n := strings.Count(d.must(t, "logs", "--no-color", "relay"), "stun requests from the container's gateway are not answered"); n != 1 {
			t.Errorf("the refusal is logged %d times, want 1", n)
		}
		addr := hostAddr(t)
		if got, local := askSTUN(t, netip.AddrPortFrom(addr, 3478)); got != local {
			t.Errorf("STUN at %v answers %v, want the socket's address %v", addr, got, local)
		}
		if metrics, want := d.metrics(t), "\nderpd_stun_gateway_refused_total 2\n"; !strings.Contains(metrics, want) {
			t.Errorf("metrics lack %q:\n%s", want, metrics)
		}
	})
	t.Run("does not answer STUN on IPv6", func(t *testing.T) {
		conn, err := dial(t, "[::1]:3478")
		if err != nil {
			t.Skip("this machine has no IPv6")
		}
		if _, err := conn.Write(stun.Request(stun.NewTxID())); err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(make([]byte, 1500)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("read %d bytes, error %v, want connection refused", n, err)
		}
	})
	t.Run("is confined", d.confined)
	t.Run("checks its health", func(t *testing.T) {
		image := d.inspect(t, "{{.Image}}")
		if got, want := docker(t, "image", "inspect", "--format", "{{json .Config.Healthcheck.Test}}", image), `["CMD","/derpd","healthcheck"]`; got != want {
			t.Errorf("health check of the image is %s, want %s", got, want)
		}
		if out, err := d.compose(t, "exec", "-T", "relay", "/derpd", "healthcheck"); err != nil {
			t.Errorf("healthcheck: %v\n%s", err, out)
		}
		out, err := d.compose(t, "exec", "-T", "-e", "DERP_ADMIN_ADDR=127.0.0.1:1", "relay", "/derpd", "healthcheck")
		if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 {
			t.Errorf("healthcheck without a relay: %v, want exit status 1\n%s", err, out)
		}
		t.Logf("ready in %v ms, image %s bytes", d.readyMillis(t), docker(t, "image", "inspect", "--format", "{{.Size}}", image))
	})
	t.Run("prints its settings", func(t *testing.T) {
		out, err := d.compose(t, "exec", "-T", "relay", "/derpd", "env")
		if err != nil || !strings.Contains(out, "DERP_ADDR") {
			t.Errorf("env: %v\n%s", err, out)
		}
	})
	t.Run("keeps its keys across a restart", func(t *testing.T) {
		d.must(t, "restart")
		d.must(t, "up", "-d", "--wait", "--no-build")
		if again := onlyRegion(t, d.derpMap(t)).Nodes[0]; again.CertName != node.CertName {
			t.Errorf("certificate was %s, is %s", node.CertName, again.CertName)
		}
		if again := exchange(t, published); again != relayKey {
			t.Errorf("node key was %v, is %v", relayKey, again)
		}
	})
	t.Run("keeps its keys in a new container", func(t *testing.T) {
		d.must(t, "up", "-d", "--wait", "--no-build", "--force-recreate")
		if again := exchange(t, published); again != relayKey {
			t.Errorf("node key was %v, is %v", relayKey, again)
		}
	})
	t.Run("stops at once", func(t *testing.T) {
		id := d.id(t)
		asked := time.Now()
		docker(t, "kill", "--signal", "SIGTERM", id)
		if code := docker(t, "wait", id); code != "0" {
			t.Errorf("exit status %s, want 0", code)
		}
		finished, err := time.Parse(time.RFC3339Nano, docker(t, "inspect", "--format", "{{.State.FinishedAt}}", id))
		if err != nil {
			t.Fatal(err)
		}
		took := finished.Sub(asked)
		t.Logf("stopped in %v", took)
		if took > stopWithin {
			t.Errorf("stopped after %v, want at most %v", took, stopWithin)
		}
	})
}

// otherPorts publishes other ports than the default ones. One setting changes the
// port and the map.
func otherPorts(t *testing.T, _ *row) {
	derpPort, httpPort, stunPort := testkit.FreePort(t), testkit.FreePort(t), testkit.FreePort(t)
	file := writeFile(t, ".env", fmt.Sprintf("DERP_PUBLIC_PORT=%d\nDERP_PUBLIC_HTTP_PORT=%d\nDERP_PUBLIC_STUN_PORT=%d\n", derpPort, httpPort, stunPort))
	d := up(t, "-f", "compose.yaml", "--env-file", file)

	region := onlyRegion(t, d.derpMap(t))
	node := region.Nodes[0]
	if node.DERPPort != derpPort || node.STUNPort != stunPort {
		t.Errorf("map has ports %d and %d, want the published %d and %d", node.DERPPort, node.STUNPort, derpPort, stunPort)
	}
	if node.CanPort80 {
		t.Error("map has CanPort80, but port 80 is not published")
	}
	exchange(t, reached(region, netip.MustParseAddr("127.0.0.1")))
	asked := netip.AddrPortFrom(hostAddr(t), uint16(stunPort))
	if got, local := askSTUN(t, asked); got != local {
		t.Errorf("STUN at %v answers %v, want the socket's address %v", asked, got, local)
	}
}

// host is the relay on the host's network, on free ports.
func host(t *testing.T, _ *row) {
	derpPort, httpPort, adminPort, stunPort := testkit.FreePort(t), testkit.FreePort(t), testkit.FreePort(t), testkit.FreePort(t)
	settings := fmt.Sprintf(`services:
  relay:
    environment:
      DERP_ADDR: ":%d"
      DERP_HTTP_PORT: "%d"
      DERP_STUN_PORT: "%d"
      DERP_ADMIN_ADDR: 127.0.0.1:%d
`, derpPort, httpPort, stunPort, adminPort)
	file := writeFile(t, "ports.yaml", settings)
	d := up(t, "-f", "compose.yaml", "-f", "docker/compose.host.yaml", "-f", file)

	region := onlyRegion(t, d.derpMap(t))
	if node := region.Nodes[0]; node.DERPPort != derpPort || node.STUNPort != stunPort {
		t.Errorf("map has ports %d and %d, want the relay's %d and %d", node.DERPPort, node.STUNPort, derpPort, stunPort)
	}
	exchange(t, reached(region, netip.MustParseAddr("127.0.0.1")))

	for _, addr := range []string{"127.0.0.1", "::1"} {
		t.Run("answers STUN at "+addr, func(t *testing.T) {
			asked := netip.AddrPortFrom(netip.MustParseAddr(addr), uint16(stunPort))
			if addr == "::1" && !hasIPv6(t) {
				t.Skip("this machine has no IPv6")
			}
			if got, local := askSTUN(t, asked); got != local {
				t.Errorf("STUN at %v answers %v, want the socket's address %v", asked, got, local)
			}
		})
	}
	t.Run("is confined", d.confined)
}

// deployment is one project of docker compose.
type deployment struct {
	args []string // arguments before the verb of docker compose
}

// up starts a new project and waits until it is healthy. The flags are those of
// docker compose, with paths relative to the root of the repository.
func up(t *testing.T, flags ...string) *deployment {
	t.Helper()
	d := prepare(t, flags...)
	started := time.Now()
	if out, err := run(t.Context(), upTimeout, slices.Concat(d.args, []string{"up", "-d", "--wait"})...); err != nil {
		t.Fatalf("docker compose up: %v\n%s", err, out)
	}
	t.Logf("healthy after %v", time.Since(started).Round(time.Millisecond))
	return d
}

// prepare describes a project without starting it. The test removes the whole
// project at its end.
func prepare(t *testing.T, flags ...string) *deployment {
	t.Helper()
	if _, err := os.Stat("../../.env"); err == nil {
		t.Fatal(".env: exists, but these tests run the relay without settings; move the file away")
	}
	d := &deployment{args: slices.Concat([]string{"compose", "-p", project(t)}, flags)}
	t.Cleanup(func() {
		// The test's context has ended by now.
		if t.Failed() {
			out, _ := run(context.Background(), dockerTimeout, slices.Concat(d.args, []string{"logs", "--no-color"})...)
			t.Logf("logs of the containers:\n%s", out)
		}
		// No data has to be saved, so the containers are killed at once.
		if out, err := run(context.Background(), dockerTimeout, slices.Concat(d.args, []string{"down", "--volumes", "--remove-orphans", "--timeout", "0"})...); err != nil {
			t.Errorf("cleaning up: %v\n%s", err, out)
		}
	})
	return d
}

func (d *deployment) compose(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return run(t.Context(), dockerTimeout, slices.Concat(d.args, args)...)
}

func (d *deployment) must(t *testing.T, args ...string) string {
	t.Helper()
	return docker(t, slices.Concat(d.args, args)...)
}

func (d *deployment) id(t *testing.T) string {
	t.Helper()
	return d.must(t, "ps", "--all", "--quiet", "relay")
}

func (d *deployment) inspect(t *testing.T, format string) string {
	t.Helper()
	return docker(t, "inspect", "--format", format, d.id(t))
}

func (d *deployment) derpMap(t *testing.T) *tailcfg.DERPMap {
	t.Helper()
	out := d.must(t, "exec", "-T", "relay", "/derpd", "derpmap", "--format", "json")
	m := new(tailcfg.DERPMap)
	if err := json.Unmarshal([]byte(out), m); err != nil {
		t.Fatalf("parsing the map: %v\n%s", err, out)
	}
	return m
}

// stunCheck returns the line of the health check about STUN.
func (d *deployment) stunCheck(t *testing.T) string {
	t.Helper()
	out := d.must(t, "exec", "-T", "relay", "/derpd", "healthcheck")
	for line := range strings.Lines(out) {
		if level, rest, _ := strings.Cut(line, " "); strings.HasPrefix(strings.TrimSpace(rest), "stun: ") {
			return level + " " + strings.TrimSpace(rest)
		}
	}
	t.Fatalf("health has no line about STUN:\n%s", out)
	return ""
}

// metrics reads the metrics of the admin listener, which listens on loopback inside
// the container.
func (d *deployment) metrics(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("entering the network of a container needs root")
	}
	out, err := exec.CommandContext(t.Context(), "nsenter", "--net", "--target", d.inspect(t, "{{.State.Pid}}"),
		"curl", "--silent", "--show-error", "--fail", "http://127.0.0.1:9090/metrics").CombinedOutput()
	if err != nil {
		t.Fatalf("reading the metrics: %v\n%s", err, out)
	}
	return string(out)
}

// readyMillis finds out from the log how long the relay took to start.
func (d *deployment) readyMillis(t *testing.T) float64 {
	t.Helper()
	for line := range strings.Lines(d.must(t, "logs", "--no-log-prefix", "--no-color", "relay")) {
		var entry struct {
			Message string  `json:"message"`
			ReadyMS float64 `json:"ready_ms"`
		}
		if json.Unmarshal([]byte(line), &entry) == nil && entry.Message == "ready" {
			return entry.ReadyMS
		}
	}
	t.Error("the log has no message \"ready\"")
	return 0
}

// confined checks the privileges of the process as the kernel reports them.
func (d *deployment) confined(t *testing.T) {
	proc := filepath.Join("/proc", d.inspect(t, "{{.State.Pid}}"))
	status, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Uid:\t65532\t65532\t65532\t65532", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"} {
		if !strings.Contains(string(status), "\n"+want+"\n") {
			t.Errorf("process lacks %q:\n%s", want, status)
		}
	}

	if got := d.inspect(t, "{{.HostConfig.ReadonlyRootfs}}"); got != "true" {
		t.Errorf("ReadonlyRootfs is %s", got)
	}
	mounts, err := os.ReadFile(filepath.Join(proc, "mountinfo"))
	if errors.Is(err, fs.ErrPermission) {
		t.Skip("reading the mounts of another process needs root")
	}
	if err != nil {
		t.Fatal(err)
	}
	// proc_pid_mountinfo(5): the fifth field is the mount point, the sixth has its options.
	options := make(map[string][]string)
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		options[fields[4]] = strings.Split(fields[5], ",")
	}
	for point, want := range map[string]string{"/": "ro", "/run/secrets": "ro", "/data": "rw"} {
		if !slices.Contains(options[point], want) {
			t.Errorf("%s is mounted %v, want %s", point, options[point], want)
		}
	}
}

// docker runs a docker command and returns its output, without the last newline.
func docker(t *testing.T, args ...string) string {
	t.Helper()
	out, err := run(t.Context(), dockerTimeout, args...)
	if err != nil {
		t.Fatalf("docker %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(out)
}

// run returns the standard output or, when the command fails, all output.
func run(ctx context.Context, timeout time.Duration, args ...string) (string, error) {
	docking.RLock()
	defer docking.RUnlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(interrupted, cancel)()
	return runEngine(ctx, timeout, args...)
}

// runEngine is run for callers that hold docking.
func runEngine(ctx context.Context, timeout time.Duration, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String() + stderr.String(), err
	}
	return stdout.String(), nil
}

func command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "docker", args...)
	// Only the test handles Ctrl-C: running commands must finish.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Dir = "../.."
	// Settings in the environment of the test must not reach compose.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "DERP_") || strings.HasPrefix(v, "COMPOSE_")
	})
	return cmd
}

func onlyRegion(t *testing.T, m *tailcfg.DERPMap) *tailcfg.DERPRegion {
	t.Helper()
	if len(m.Regions) != 1 {
		t.Fatalf("map has %d regions, want 1", len(m.Regions))
	}
	for id, region := range m.Regions {
		if region.RegionID != id || len(region.Nodes) != 1 || region.Nodes[0].RegionID != id {
			t.Fatalf("region %d is not consistent: %+v", id, region)
		}
		return region
	}
	return nil
}

// reached returns the region with addr as the address of the relay.
func reached(region *tailcfg.DERPRegion, addr netip.Addr) *tailcfg.DERPRegion {
	region = region.Clone()
	region.Nodes[0].IPv4 = addr.String()
	region.Nodes[0].IPv6 = "none"
	return region
}

// exchange passes packets between two clients, both ways, and returns the key of
// the relay.
func exchange(t *testing.T, region *tailcfg.DERPRegion) key.NodePublic {
	t.Helper()
	a, b := testkit.RegionClient(t, region, key.NewNode()), testkit.RegionClient(t, region, key.NewNode())
	testkit.Exchange(t, a, b)
	if a.ServerPublicKey() != b.ServerPublicKey() {
		t.Errorf("the clients connected to two relays: %v and %v", a.ServerPublicKey(), b.ServerPublicKey())
	}
	return a.ServerPublicKey()
}

// dial returns a UDP socket that ends with the test.
func dial(t *testing.T, addr string) (net.Conn, error) {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(t.Context(), "udp", addr)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn, conn.SetDeadline(time.Now().Add(peerTimeout))
}

// askSTUN returns the address in the STUN answer and that of the socket.
func askSTUN(t *testing.T, server netip.AddrPort) (seen, local netip.AddrPort) {
	t.Helper()
	conn, err := dial(t, server.String())
	if err != nil {
		t.Fatal(err)
	}
	tx := stun.NewTxID()
	if _, err := conn.Write(stun.Request(tx)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1500)
	n, err := conn.Read(buf)
	if err != nil {
		t.Fatalf("STUN at %v does not answer: %v", server, err)
	}
	got, seen, err := stun.ParseResponse(buf[:n])
	if err != nil || got != tx {
		t.Fatalf("STUN at %v: transaction %x, want %x, error %v", server, got, tx, err)
	}
	return seen, netip.MustParseAddrPort(conn.LocalAddr().String())
}

// hostAddr returns the address by which other machines reach this one. Packets to it
// pass through Docker as those of other machines do; packets to loopback do not.
func hostAddr(t *testing.T) netip.Addr {
	t.Helper()
	conn, err := dial(t, "198.51.100.1:9") // nothing is sent
	if err != nil {
		t.Skipf("this machine has no network: %v", err)
	}
	return netip.MustParseAddrPort(conn.LocalAddr().String()).Addr()
}

func hasIPv6(t *testing.T) bool {
	t.Helper()
	_, err := dial(t, "[::1]:9")
	return err == nil
}

func writeFile(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
