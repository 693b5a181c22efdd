//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"derpd/internal/testkit"
)

// dualStack is a relay whose name has addresses of both families in DNS.
func dualStack(t *testing.T, r *row) {
	n := families(t, r, map[string]string{})
	if n.RegionV4Latency[900] == 0 || n.RegionV6Latency[900] == 0 {
		t.Errorf("netcheck measures %+v, want both families", n)
	}
}

// ipv6Only is a relay without IPv4. The map says so, and clients use only IPv6.
func ipv6Only(t *testing.T, r *row) {
	n := families(t, r, map[string]string{"DERP_PUBLIC_IPV4": "none"})
	if n.RegionV4Latency[900] != 0 || n.RegionV6Latency[900] == 0 {
		t.Errorf("netcheck measures %+v, want IPv6 only", n)
	}
}

// families runs a world whose networks have IPv4 and IPv6.
func families(t *testing.T, r *row, env map[string]string) netcheck {
	w := newWorld(t, r)
	w.withIPv6()
	// Engines before 27 route IPv6 between their networks.
	for _, name := range []string{"a", "b"} {
		w.services[name] += "      TS_DEBUG_NEVER_DIRECT_UDP: \"1\"\n"
	}
	env["DERP_DOMAIN"], env["DERP_CERT_MODE"] = relayName, "pinned"
	w.addRelay(relay{name: "relay", hostName: relayName, env: env})
	w.start("relay")
	m := w.headscaleMap("relay")
	w.startControl(m)
	w.join("a", "b")
	w.carries(900, "derpd")
	n := w.sees("a", 900)
	for _, global := range []string{n.GlobalV4, n.GlobalV6} {
		if global != "" {
			w.saw("STUN answers %s", global)
		}
	}
	// The DERP connection uses IPv6 too, not only STUN.
	if peers := w.connections("a"); env["DERP_PUBLIC_IPV4"] == "none" && !strings.Contains(peers, "]:443") {
		t.Errorf("a is connected to %s, want IPv6", peers)
	}
	return n
}

// connections returns the remote ends of a container's TCP connections.
func (w *world) connections(service string) string {
	w.t.Helper()
	var list []string
	if err := w.agent(service, &list, "connections"); err != nil {
		w.t.Fatal(err)
	}
	return strings.Join(list, " ")
}

// captivePortal sends the request with which clients detect a captive portal: plain
// HTTP with a challenge. A portal does not answer the challenge.
func captivePortal(t *testing.T, r *row) {
	w := newWorld(t, r)
	w.addRelay(relay{name: "relay", hostName: relayName, env: map[string]string{"DERP_DOMAIN": relayName, "DERP_CERT_MODE": "pinned"}})
	w.start("relay")
	w.start("a")
	const challenge = "ts_derp.example.test"
	for _, header := range []string{"X-Tailscale-Challenge: " + challenge, ""} {
		var got struct {
			Status int
			Header map[string][]string
			Body   string
		}
		if err := w.agent("a", &got, "get", "http://"+relayName+"/generate_204", header); err != nil {
			t.Fatal(err)
		}
		want := ""
		if header != "" {
			want = "response " + challenge
		}
		if response := strings.Join(got.Header["X-Tailscale-Response"], ","); got.Status != 204 || got.Body != "" || response != want {
			t.Errorf("with the header %q the answer is %+v, want 204 and the response %q", header, got, want)
		}
	}
	w.saw("204, response %q to the challenge, none without", "response "+challenge)
}

// behindHAProxy is the relay on a machine where HAProxy has port 443.
func behindHAProxy(t *testing.T, r *row) {
	config := readRecipe(t, "haproxy.cfg")
	w := behindProxy(t, r, "haproxy", config, "/usr/sbin/haproxy", "-db", "-f", "/etc/proxy/proxy.conf")
	// The relay gets the client's address by the PROXY protocol. The client does not
	// trust the certificate, and the relay logs the failed handshake with the address.
	own := docker(t, "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", w.container("a"))
	if err := w.agent("a", new(any), "leaf", "derp.example.com:443", "derp.example.com"); err == nil {
		t.Error("the client accepts a self-signed certificate")
	}
	w.eventually("the relay to log "+own, func() error {
		if log := w.must(t, "logs", "--no-color", "relay"); !strings.Contains(log, "TLS handshake error from "+own+":") {
			return errors.New("no such message")
		}
		return nil
	})
	w.saw("client's address %s known", own)
}

// behindNginx is the same with nginx.
func behindNginx(t *testing.T, r *row) {
	const head = "daemon off;\nload_module /usr/lib/nginx/modules/ngx_stream_module.so;\npid /tmp/nginx.pid;\nevents {}\n"
	config := head + readRecipe(t, "nginx.conf")
	behindProxy(t, r, "nginx", config, "/usr/sbin/nginx", "-e", "/dev/stderr", "-c", "/etc/proxy/proxy.conf")
}

func readRecipe(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile("../proxies/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// behindProxy runs a proxy of this machine in the relay's network, as on one host,
// with the files of docker/proxies unchanged.
func behindProxy(t *testing.T, r *row, name, config string, command ...string) *world {
	if _, err := exec.LookPath(command[0]); err != nil {
		t.Skipf("%s is not installed", name)
	}
	w := newWorld(t, r)
	const hostName = "derp.example.com" // name in docker/proxies
	env := map[string]string{"DERP_CERT_MODE": "pinned", "DERP_LOG_LEVEL": "debug"}
	for line := range strings.Lines(readRecipe(t, "derpd.env")) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(name, "#") {
			env[name] = value
		}
	}
	w.addRelay(relay{name: "relay", hostName: hostName, env: env})
	if err := os.Mkdir(filepath.Join(w.dir, "proxy"), 0o755); err != nil {
		t.Fatal(err)
	}
	w.write("proxy/proxy.conf", config)
	w.services["proxy"] = fmt.Sprintf(`
    image: %s
    entrypoint: [%s]
    network_mode: service:relay
    volumes: ["/usr:/usr:ro", "/lib:/lib:ro", "/lib64:/lib64:ro", "/etc/passwd:/etc/passwd:ro", "/etc/group:/etc/group:ro", "%s:/etc/proxy:ro"]
`, peersImage(t), strings.Join(command, ", "), filepath.Join(w.dir, "proxy"))
	w.start("relay")
	w.start("proxy")
	w.startControl(w.headscaleMap("relay"))
	w.join("a", "b")
	w.carries(900, "derpd")
	return w
}

// wrongSTUN publishes the STUN port in the usual way, so that Docker's proxy forwards
// packets from its own address. Upstream's relay then answers with the address of the
// bridge's gateway, and clients assume a hard NAT. derpd must not answer, and its
// health must explain why.
func wrongSTUN(t *testing.T, r *row) {
	w := newWorld(t, r)
	own := newAuthority(t)
	own.saveRoot(w, "roots/roots.pem")
	w.networks["a"] = "    driver: bridge\n" // open, so that this machine can be reached
	// A relay that is reached without a proxy.
	w.addRelay(relay{name: "relay", hostName: relayName, env: map[string]string{
		"DERP_DOMAIN": relayName, "DERP_CERT_MODE": "pinned", "DERP_REGION_ID": "901", "DERP_REGION_CODE": "straight",
	}})
	w.start("relay")
	// The address of this machine on the network of a.
	machine := docker(t, "network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", project(t)+"_a")
	if _, err := netip.ParseAddr(machine); err != nil {
		subnet := netip.MustParsePrefix(docker(t, "network", "inspect", "--format", "{{(index .IPAM.Config 0).Subnet}}", project(t)+"_a"))
		machine = subnet.Masked().Addr().Next().String()
	}
	const name = "derp2.example.test"
	derpPort, stunPort := testkit.FreePort(t), testkit.FreePort(t)
	published := []string{fmt.Sprintf("%d:443", derpPort), fmt.Sprintf("%d:3478/udp", stunPort)}
	own.issue(w, name, name, time.Hour)
	w.addRelay(manualRelay(w, relay{
		name: "relay-two", hostName: name, on: []string{"default"}, ports: published,
		env: map[string]string{
			"DERP_REGION_ID": "902", "DERP_REGION_CODE": "published", "DERP_PUBLIC_IPV4": machine, "DERP_PUBLIC_IPV6": "none",
			"DERP_PUBLIC_PORT": fmt.Sprint(derpPort), "DERP_PUBLIC_STUN_PORT": fmt.Sprint(stunPort),
		},
	}))
	w.start("relay-two")
	w.startControl(w.headscaleMap("relay"), w.headscaleMap("relay-two"))
	w.must(t, "rm", "--stop", "--force", "relay-two")
	w.services["derper"] = strings.NewReplacer(
		"networks: {a: {aliases: ["+relayName+"]}, b: {aliases: ["+relayName+"]}}\n", "networks: [default]\n    ports: ["+strings.Join(published, ", ")+"]\n",
		relayName, name,
	).Replace(derper(w, peersImage(t)))
	w.start("derper")
	w.join("a")

	var n netcheck
	w.eventually("a to detect a hard NAT behind upstream's relay", func() error {
		var err error
		if n, err = w.netcheck("a"); err == nil && n.MappingVariesByDestIP != true {
			err = fmt.Errorf("netcheck finds %+v", n)
		}
		return err
	})
	w.saw("derper: MappingVariesByDestIP")

	w.must(t, "rm", "--stop", "--force", "derper")
	w.start("relay-two")
	n = w.sees("a", 901)
	if n.RegionLatency[902] != 0 {
		t.Errorf("netcheck measures the region whose STUN must be refused: %+v", n)
	}
	out, err := w.tryExec("relay-two", "/derpd", "healthcheck")
	if err != nil || !strings.Contains(out, "publish STUN on 0.0.0.0 only") {
		t.Errorf("health does not explain the refusal: %v\n%s", err, out)
	}
	w.saw("derpd: refused, explained in health, netcheck right")
}
