//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tailscale.com/types/key"

	"derpd/internal/testkit"
	"derpd/internal/testkit/peers"
)

const (
	relayName = "derp.example.test" // of the relay, in Docker's DNS
	copied    = 16 << 20            // bytes, to see that a relay carries them
)

// headscaleConfig has only the relays of the test.
const headscaleConfig = `server_url: http://headscale:8080
listen_addr: 0.0.0.0:8080
metrics_listen_addr: ""
noise: {private_key_path: /var/lib/headscale/noise.key}
prefixes: {v4: 100.64.0.0/10}
derp: {server: {enabled: false}, urls: [], paths: [/etc/headscale/derp.yaml], auto_update_enabled: false}
disable_check_updates: true
database: {type: sqlite, sqlite: {path: /var/lib/headscale/db.sqlite}}
dns: {magic_dns: false, override_local_dns: false}
unix_socket: /var/lib/headscale/socket
`

// closed is a network without a route to others.
const closed = "    internal: true\n"

// unmasked is a network that can send to others but gets no answers.
const unmasked = "    driver_opts: {com.docker.network.bridge.enable_ip_masquerade: \"false\"}\n"

// world is a tailnet with nodes a and b on two closed networks. Only the relay and the
// control server are on both networks.
type world struct {
	*deployment
	*row
	t *testing.T

	dir      string            // directory of files that containers mount
	file     string            // compose file that is merged with compose.yaml
	services map[string]string // YAML of each service
	networks map[string]string
	volumes  []string
	user     string // headscale's identifier of the nodes' owner
	authKey  string // key by which nodes log in; empty before the first login
}

// newWorld describes a world. Its services are started later, and removed at the end
// of the test.
func newWorld(t *testing.T, r *row) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{
		row: r, t: t, dir: dir, file: filepath.Join(dir, "world.yaml"),
		services: make(map[string]string),
		networks: map[string]string{"a": closed, "b": closed},
	}
	for _, sub := range []string{"headscale", "certs", "roots"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	w.write("headscale/config.yaml", headscaleConfig)
	w.write("roots/roots.pem", "")
	image := peersImage(t)
	w.services["headscale"] = fmt.Sprintf(`
    image: %s
    entrypoint: [/bin/headscale, serve, --config, /etc/headscale/config.yaml]
    networks: [a, b]
    tmpfs: [/var/lib/headscale]
    volumes: ["%s:/etc/headscale:ro"]
`, image, filepath.Join(dir, "headscale"))
	for _, name := range []string{"a", "b"} {
		w.addNode(name, name)
	}
	w.deployment = prepare(t, "-f", "compose.yaml", "-f", w.file)
	return w
}

// write writes a file that containers mount.
func (w *world) write(name, content string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// replace writes a file and renames it, so that no reader sees half of it.
func (w *world) replace(name, content string) {
	w.t.Helper()
	if err := os.Rename(w.write(name+".new", content), filepath.Join(w.dir, name)); err != nil {
		w.t.Fatal(err)
	}
}

// addNode describes a tailscaled with a tunnel device.
func (w *world) addNode(name, network string) {
	w.services[name] = fmt.Sprintf(`
    image: %s
    entrypoint: [/bin/tailscaled, --statedir=/var/lib/tailscale, --no-logs-no-support, --encrypt-state=false]
    hostname: %s
    networks: [%s]
    cap_add: [NET_ADMIN]
    devices: [/dev/net/tun]
    volumes: ["%s:/run/roots:ro"]
    environment:
      SSL_CERT_FILE: /run/roots/roots.pem
      TS_PANIC_IF_HIT_MAIN_CONTROL: "1"
      TS_DISABLE_PORTMAPPER: "1"
`, peersImage(w.t), name, network, filepath.Join(w.dir, "roots"))
}

// relay describes how a relay differs from compose.yaml.
type relay struct {
	name     string   // name of the service; relay unless there are several
	hostName string   // name in Docker's DNS; relayName unless there are several
	on       []string // networks; those of both nodes if it is empty
	networks string   // more lines of networks, each indented by 6
	ports    []string // published ports
	env      map[string]string
	volumes  []string
	more     string // more lines of the service, each indented by 4
}

// addRelay describes a relay with the product's image and compose.yaml. By default it
// is on the networks of both nodes and publishes no port.
func (w *world) addRelay(r relay) {
	var s strings.Builder
	if r.name != "relay" {
		compose, err := filepath.Abs("../../compose.yaml")
		if err != nil {
			w.t.Fatal(err)
		}
		fmt.Fprintf(&s, "\n    extends: {file: %s, service: relay}", compose)
		w.volumes = append(w.volumes, "data-"+r.name)
		r.volumes = append(r.volumes, "data-"+r.name+":/data")
	}
	ports := "!reset []"
	if len(r.ports) > 0 {
		ports = fmt.Sprintf("!override [%s]", strings.Join(r.ports, ", "))
	}
	fmt.Fprintf(&s, "\n    ports: %s", ports)
	s.WriteString(`
    build: !reset null
    healthcheck: {interval: 1s}
    sysctls: {net.ipv4.ip_forward: "0"}
    networks:
`)
	if len(r.on) == 0 {
		r.on = []string{"a", "b"}
	}
	for _, network := range r.on {
		fmt.Fprintf(&s, "      %s: {aliases: [%s]}\n", network, r.hostName)
	}
	s.WriteString(r.networks)
	s.WriteString("    environment:\n")
	for _, name := range slices.Sorted(maps.Keys(r.env)) {
		fmt.Fprintf(&s, "      %s: %q\n", name, r.env[name])
	}
	if len(r.volumes) > 0 {
		s.WriteString("    volumes:\n")
		for _, v := range r.volumes {
			fmt.Fprintf(&s, "      - %q\n", v)
		}
	}
	s.WriteString(r.more)
	w.services[r.name] = s.String()
}

// compile writes the compose file of the world.
func (w *world) compile() {
	w.t.Helper()
	var s strings.Builder
	s.WriteString("services:\n")
	for _, name := range slices.Sorted(maps.Keys(w.services)) {
		fmt.Fprintf(&s, "  %s:%s", name, w.services[name])
	}
	s.WriteString("networks:\n")
	for _, name := range slices.Sorted(maps.Keys(w.networks)) {
		fmt.Fprintf(&s, "  %s:\n%s", name, w.networks[name])
	}
	if len(w.volumes) > 0 {
		s.WriteString("volumes:\n")
		for _, name := range slices.Compact(slices.Sorted(slices.Values(w.volumes))) {
			fmt.Fprintf(&s, "  %s:\n", name)
		}
	}
	w.write("world.yaml", s.String())
}

// withIPv6 gives the nodes' networks IPv6 besides IPv4.
func (w *world) withIPv6() {
	for _, name := range []string{"a", "b"} {
		w.networks[name] = closed + fmt.Sprintf("    enable_ipv6: true\n    ipam: {config: [{subnet: %q}]}\n", randomULA().String())
	}
}

// randomULA returns a random network of RFC 4193.
func randomULA() netip.Prefix {
	addr := [16]byte{0xfd}
	_, _ = rand.Read(addr[1:8])
	return netip.PrefixFrom(netip.AddrFrom16(addr), 64)
}

// start starts services and waits until they run, and are healthy if they have a
// health check.
func (w *world) start(services ...string) {
	w.t.Helper()
	w.compile()
	args := append([]string{"up", "-d", "--no-deps", "--no-build", "--wait"}, services...)
	if out, err := run(w.t.Context(), upTimeout, slices.Concat(w.args, args)...); err != nil {
		w.t.Fatalf("starting %v: %v\n%s", services, err, out)
	}
}

// container returns the name of a service's container.
func (w *world) container(service string) string { return project(w.t) + "-" + service + "-1" }

// tryExec runs a program in the container of a service, and may fail.
func (w *world) tryExec(service string, args ...string) (string, error) {
	return run(w.t.Context(), dockerTimeout, slices.Concat([]string{"exec", w.container(service)}, args)...)
}

// exec runs a program in the container of a service.
func (w *world) exec(service string, args ...string) string {
	w.t.Helper()
	return docker(w.t, slices.Concat([]string{"exec", w.container(service)}, args)...)
}

// agent runs a verb of the agent in the container of a service. The relay's image has
// no agent.
func (w *world) agent(service string, v any, args ...string) error {
	w.t.Helper()
	out, err := w.tryExec(service, append([]string{"/bin/agent"}, args...)...)
	if err != nil {
		return fmt.Errorf("agent %v on %s: %w\n%s", args, service, err, out)
	}
	return json.Unmarshal([]byte(out), v)
}

// headscaleMap returns the map that a relay prints for Headscale.
func (w *world) headscaleMap(service string) string {
	w.t.Helper()
	return w.exec(service, "/derpd", "derpmap", "--format", "headscale") + "\n"
}

// startControl starts headscale with these maps, and creates a user.
func (w *world) startControl(maps ...string) {
	w.t.Helper()
	config := headscaleConfig
	if len(maps) > 1 {
		var paths []string
		for i := range maps {
			paths = append(paths, fmt.Sprintf("/etc/headscale/derp%d.yaml", i))
		}
		config = strings.ReplaceAll(config, "/etc/headscale/derp.yaml", strings.Join(paths, ", "))
		w.write("headscale/config.yaml", config)
		for i, m := range maps {
			w.write(fmt.Sprintf("headscale/derp%d.yaml", i), m)
		}
	} else {
		w.write("headscale/derp.yaml", maps[0])
	}
	w.start("headscale")
	w.eventually("headscale to create a user", func() error {
		var created struct{ ID uint64 }
		err := w.headscale(&created, "users", "create", "somebody")
		w.user = fmt.Sprint(created.ID)
		return err
	})
}

// headscale runs a command of headscale and decodes its output into v.
func (w *world) headscale(v any, args ...string) error {
	out, err := w.tryExec("headscale", append([]string{"/bin/headscale", "--config", "/etc/headscale/config.yaml", "--output", "json"}, args...)...)
	if err != nil {
		return fmt.Errorf("headscale %v: %w\n%s", args, err, out)
	}
	return json.Unmarshal([]byte(out), v)
}

// join starts nodes and logs them in to headscale.
func (w *world) join(nodes ...string) {
	w.t.Helper()
	w.start(nodes...)
	for _, node := range nodes {
		w.login(node)
	}
}

// login logs in a running node. The relay may still refuse the node.
func (w *world) login(node string) {
	w.t.Helper()
	if w.authKey == "" {
		var auth struct{ Key string }
		if err := w.headscale(&auth, "preauthkeys", "create", "--reusable", "--user", w.user); err != nil {
			w.t.Fatal(err)
		}
		w.authKey = auth.Key
	}
	docker(w.t, "exec", "--detach", w.container(node), "/bin/agent", "serve")
	w.exec(node, "/bin/tailscale", "up", "--login-server=http://headscale:8080", "--auth-key="+w.authKey,
		"--hostname="+node, "--accept-dns=false", "--netfilter-mode=off", "--timeout=50s")
}

// remove removes a node from the tailnet.
func (w *world) remove(node string) {
	w.t.Helper()
	var nodes []struct {
		ID        uint64
		GivenName string `json:"given_name"`
	}
	if err := w.headscale(&nodes, "nodes", "list"); err != nil {
		w.t.Fatal(err)
	}
	for _, n := range nodes {
		if n.GivenName == node {
			if err := w.headscale(new(any), "nodes", "delete", "--force", "--identifier", fmt.Sprint(n.ID)); err != nil {
				w.t.Fatal(err)
			}
			return
		}
	}
	w.t.Fatalf("headscale has no node %s: %+v", node, nodes)
}

// eventually repeats an attempt until it returns nil.
func (w *world) eventually(what string, attempt func() error) {
	w.t.Helper()
	w.within(testkit.Patience, what, attempt)
}

func (w *world) within(limit time.Duration, what string, attempt func() error) {
	w.t.Helper()
	testkit.Within(w.t, limit, what, func(context.Context) error {
		if interrupted.Err() != nil {
			w.t.Fatal("interrupted")
		}
		return attempt()
	})
}

// peerStatus is a node in the output of tailscale status.
type peerStatus struct {
	PublicKey    key.NodePublic
	HostName     string
	TailscaleIPs []string
	Relay        string // code of its home region
	CurAddr      string // address of a direct connection
}

type nodeStatus struct {
	Self peerStatus
	Peer map[string]peerStatus
}

func (w *world) status(node string) nodeStatus {
	w.t.Helper()
	var s nodeStatus
	if err := json.Unmarshal([]byte(w.exec(node, "/bin/tailscale", "status", "--json")), &s); err != nil {
		w.t.Fatal(err)
	}
	return s
}

// address returns the address of a node in the tailnet.
func (w *world) address(node string) string {
	w.t.Helper()
	return w.status(node).Self.TailscaleIPs[0]
}

// netcheck is the output of tailscale netcheck.
type netcheck struct {
	UDP                   bool
	IPv4, IPv6            bool
	GlobalV4, GlobalV6    string
	MappingVariesByDestIP any
	PreferredDERP         int
	RegionLatency         map[int]time.Duration
	RegionV4Latency       map[int]time.Duration
	RegionV6Latency       map[int]time.Duration
}

func (w *world) netcheck(node string) (netcheck, error) {
	var n netcheck
	out, err := w.tryExec(node, "/bin/tailscale", "netcheck", "--format=json")
	if err != nil {
		return n, fmt.Errorf("netcheck: %w\n%s", err, out)
	}
	// Log lines precede the report.
	_, report, _ := strings.Cut(out, "{")
	err = json.Unmarshal([]byte("{"+report), &n)
	return n, err
}

// sees checks that a node measures the region, and that STUN answers with the node's
// own address, as there is no NAT in between.
func (w *world) sees(node string, region int) netcheck {
	w.t.Helper()
	var n netcheck
	w.eventually(node+" to find the region", func() error {
		var err error
		n, err = w.netcheck(node)
		switch {
		case err != nil:
			return err
		case !n.UDP || n.RegionLatency[region] <= 0:
			return fmt.Errorf("netcheck finds %+v", n)
		}
		return nil
	})
	if n.MappingVariesByDestIP == true {
		w.t.Errorf("netcheck on %s reports a hard NAT: %+v", node, n)
	}
	own := docker(w.t, "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}} {{end}}", w.container(node))
	for _, global := range []string{n.GlobalV4, n.GlobalV6} {
		if global == "" {
			continue
		}
		at, err := netip.ParseAddrPort(global)
		if err != nil || !slices.Contains(strings.Fields(own), at.Addr().String()) {
			w.t.Errorf("STUN answers %s with %s, want one of %s", node, global, own)
		}
	}
	return n
}

// ping sends one ping from a node to an address in the tailnet.
func (w *world) ping(from, address string) (string, error) {
	out, err := w.tryExec(from, "/bin/tailscale", "ping", "--c=1", "--timeout=2s", "--until-direct=false", address)
	if err != nil {
		return "", fmt.Errorf("ping: %w\n%s", err, out)
	}
	return strings.TrimSpace(out), nil
}

// pings waits until one node reaches another through the region, and returns the
// route and the time.
func (w *world) pings(from, to, region string) string {
	w.t.Helper()
	address, answer := w.address(to), ""
	w.eventually(from+" to reach "+to+" via DERP("+region+")", func() error {
		out, err := w.ping(from, address)
		if err == nil && !strings.Contains(out, "via DERP("+region+")") {
			err = errors.New(out)
		}
		answer = out
		return err
	})
	_, answer, _ = strings.Cut(answer, "via ")
	return answer
}

// unreachable checks that none of three pings arrives.
func (w *world) unreachable(from, to string) {
	w.t.Helper()
	address := w.address(to)
	for range 3 {
		if out, err := w.ping(from, address); err == nil {
			w.t.Errorf("%s reaches %s: %s", from, to, out)
		}
	}
}

// copies copies bytes from one node to another and compares them. It returns a summary
// with the time.
func (w *world) copies(from, to string) string {
	w.t.Helper()
	var got struct {
		Bytes   int64
		Seconds float64
		SHA256  string
	}
	if err := w.agent(to, &got, "copy", w.address(from), fmt.Sprint(copied)); err != nil {
		w.t.Fatal(err)
	}
	return fmt.Sprintf("%d MiB in %.1f s, sha256 %.8s ok", got.Bytes>>20, got.Seconds, got.SHA256)
}

// carries checks a relay from both nodes. STUN must answer with the right address, the
// nodes must reach each other through the region only, and bytes must arrive unchanged.
func (w *world) carries(region int, code string) {
	w.t.Helper()
	n := w.sees("a", region)
	w.sees("b", region)
	answer := w.pings("a", "b", code)
	w.pings("b", "a", code)
	speed := w.copies("b", "a")
	for _, peer := range w.status("a").Peer {
		if peer.HostName == "b" && (peer.Relay != code || peer.CurAddr != "") {
			w.t.Errorf("a reaches b by %+v, want only the relay %s", peer, code)
		}
	}
	w.saw("netcheck %v; ping via %s; %s", n.RegionLatency[region].Round(10*time.Microsecond), answer, speed)
}

// transfer is a TCP transfer and UDP echoes between two nodes.
type transfer struct {
	w    *world
	stop func() error

	mu    sync.Mutex
	state flowState // guarded by mu
}

// flowState is a report of the agent's flow.
type flowState struct {
	Bytes, Echoes int64
	TCPSilence    float64 `json:"tcp_silence"`
	UDPSilence    float64 `json:"udp_silence"`
	TCPIdle       float64 `json:"tcp_idle"`
	UDPIdle       float64 `json:"udp_idle"`
}

// begin starts a transfer from one node to another that lasts until finish.
func (w *world) begin(from, to string) *transfer {
	w.t.Helper()
	tr := &transfer{w: w}
	ctx, cancel := context.WithCancel(w.t.Context())
	unhook := context.AfterFunc(interrupted, cancel)
	cmd := command(ctx, "exec", "--interactive", w.container(to), "/bin/agent", "flow", w.address(from))
	stderr := new(strings.Builder)
	cmd.Stderr = stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			var s flowState
			if json.Unmarshal(lines.Bytes(), &s) == nil {
				tr.mu.Lock()
				tr.state = s
				tr.mu.Unlock()
			}
		}
	}()
	tr.stop = sync.OnceValue(func() error {
		defer cancel()
		defer unhook()
		_ = in.Close()
		<-read
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("transfer: %w\n%s", err, stderr)
		}
		return nil
	})
	w.t.Cleanup(func() { _ = tr.stop() })
	w.eventually("a transfer to flow", tr.flows)
	return tr
}

func (tr *transfer) now() flowState {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.state
}

// flows returns an error unless TCP and UDP traffic both flow.
func (tr *transfer) flows() error {
	const idle = 0.2 // seconds
	if s := tr.now(); s.Bytes == 0 || s.Echoes == 0 || s.TCPIdle > idle || s.UDPIdle > idle {
		return fmt.Errorf("no traffic: %+v", s)
	}
	return nil
}

// finish waits until the traffic flows, ends it, and returns how long it did not
// flow.
func (tr *transfer) finish() flowState {
	tr.w.t.Helper()
	tr.w.eventually("the transfer to flow again", tr.flows)
	before := tr.now().Bytes
	tr.w.eventually("the transfer to continue", func() error {
		if tr.now().Bytes < before+4<<20 {
			return errors.New("too few bytes have arrived")
		}
		return nil
	})
	if err := tr.stop(); err != nil {
		tr.w.t.Fatal(err)
	}
	return tr.now()
}

// buildPeers builds the image with all programs besides the relay, once for all
// scenarios.
var buildPeers = sync.OnceValues(func() (string, error) {
	name := fmt.Sprintf("%s%d-peers", prefix, os.Getpid())
	dir, err := os.MkdirTemp("", "image")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	for program, pkg := range map[string]string{"agent": "./docker/e2e/agent", "pebble": "github.com/letsencrypt/pebble/v2/cmd/pebble"} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(dir, program), pkg)
		cmd.Dir = "../.."
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("building %s: %w\n%s", program, err, out)
		}
	}
	folder := os.Getenv("DERPD_PEERS")
	programs := map[string]string{"derper": os.Getenv("DERPD_DERPER")}
	for _, program := range []string{"containerboot", "tailscaled", "tailscale", "headscale"} {
		programs[program] = filepath.Join(folder, program)
	}
	for program, path := range programs {
		if err := copyFile(path, filepath.Join(dir, program)); err != nil {
			return "", fmt.Errorf("%w; run make e2e", err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "tmp"), 0o777); err != nil {
		return "", err
	}
	const file = "FROM scratch\nENV PATH=/bin\nCOPY tmp /tmp\nCOPY agent containerboot derper headscale pebble tailscale tailscaled /bin/\n"
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(file), 0o600); err != nil {
		return "", err
	}
	out, err := run(context.Background(), dockerTimeout, "build", "--quiet", "--tag", name, dir)
	if err != nil {
		return "", fmt.Errorf("building the peers' image: %w\n%s", err, out)
	}
	return name, nil
})

// peersImage returns the image with all programs besides the relay.
func peersImage(t *testing.T) string {
	t.Helper()
	peers.Program(t, "tailscaled") // skips the test if it is missing
	name, err := buildPeers()
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
