//go:build e2e

package e2e

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"derpd/internal/testkit"
)

// pinned is a relay without a domain, on an address outside the networks of both
// nodes, and on other ports than the default ones.
func pinned(t *testing.T, r *row) {
	w := newWorld(t, r)
	// A part of 203.0.113.0/24 (RFC 5737), chosen by the PID so that runs differ.
	subnet := netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(os.Getpid() << 4)}), 28)
	addr := subnet.Addr().Next().Next()
	w.networks["public"] = closed + fmt.Sprintf("    ipam: {config: [{subnet: %s}]}\n", subnet)
	// On a closed network, Docker drops packets to addresses of other networks, even
	// between neighbours.
	for _, name := range []string{"a", "b"} {
		w.networks[name] = unmasked
	}
	w.addRelay(relay{
		name: "relay", hostName: "relay-itself",
		env: map[string]string{
			"DERP_ADDR": ":8443", "DERP_STUN_PORT": "13478",
			"DERP_PUBLIC_IPV4": addr.String(), "DERP_PUBLIC_IPV6": "none",
		},
		networks: fmt.Sprintf("      public: {ipv4_address: %s}\n", addr),
	})
	w.start("relay")
	m := w.headscaleMap("relay")
	for _, want := range []string{"sha256-raw:", "8443", "13478", addr.String()} {
		if !strings.Contains(m, want) {
			t.Errorf("the map lacks %s:\n%s", want, m)
		}
	}
	w.startControl(m)
	w.start("a", "b")
	for _, node := range []string{"a", "b"} {
		w.exec(node, "/bin/agent", "route", addr.String(), "relay-itself")
	}
	w.join("a", "b")
	w.carries(900, "derpd")
}

// acmeHTTP obtains a certificate by HTTP-01, as from Let's Encrypt.
func acmeHTTP(t *testing.T, r *row) {
	acme(t, r, map[string]string{"DERP_ACME_CHALLENGES": "http"})
}

// acmeTLSALPN obtains it by TLS-ALPN-01, with port 80 closed.
func acmeTLSALPN(t *testing.T, r *row) {
	acme(t, r, map[string]string{"DERP_HTTP_PORT": "-1"})
}

// acme runs pebble, a certificate authority that validates a name by its ports 80
// and 443 and finds it in DNS.
func acme(t *testing.T, r *row, env map[string]string) {
	w := newWorld(t, r)
	own := newAuthority(t)
	own.issue(w, "pebble", "pebble", time.Hour)
	w.write("certs/pebble.json", `{"pebble": {
  "listenAddress": "0.0.0.0:14000", "managementListenAddress": "0.0.0.0:15000",
  "certificate": "/etc/pebble/pebble.crt", "privateKey": "/etc/pebble/pebble.key",
  "httpPort": 80, "tlsPort": 443, "profiles": {"default": {"description": "", "validityPeriod": 7776000}}}}`)
	own.saveRoot(w, "certs/root.pem")
	w.services["pebble"] = fmt.Sprintf(`
    image: %s
    entrypoint: [/bin/pebble, -config, /etc/pebble/pebble.json]
    networks: [a, b]
    environment: {PEBBLE_VA_NOSLEEP: "1"}
    volumes: ["%s:/etc/pebble:ro"]
`, peersImage(t), filepath.Join(w.dir, "certs"))
	w.start("pebble")

	env["DERP_DOMAIN"] = relayName
	env["DERP_ACME_CA"] = "https://pebble:14000/dir"
	env["DERP_ACME_CA_ROOTS"] = "/etc/roots/root.pem"
	w.addRelay(relay{name: "relay", hostName: relayName, env: env, volumes: []string{filepath.Join(w.dir, "certs") + ":/etc/roots:ro"}})
	started := time.Now()
	w.start("relay") // returns when it is healthy, so with a certificate
	took := time.Since(started)
	w.startControl(w.headscaleMap("relay"))

	var root struct{ Body string }
	if err := w.agent("headscale", &root, "get", "https://pebble:15000/roots/0", ""); err != nil {
		t.Fatal(err)
	}
	w.write("roots/roots.pem", root.Body)
	w.join("a", "b")
	w.carries(900, "derpd")
	log := w.must(t, "logs", "--no-color", "pebble")
	if by, want := strings.Contains(log, "validate w/ HTTP"), env["DERP_HTTP_PORT"] == ""; by != want || !strings.Contains(log, "set VALID") {
		t.Errorf("the authority used port 80: %v, want %v:\n%s", by, want, log)
	}
	w.saw("certified and healthy after %.1f s", took.Seconds())
}

// manualReplaced replaces the certificate files during a transfer, as acme.sh or
// lego do.
func manualReplaced(t *testing.T, r *row) {
	w := newWorld(t, r)
	own := newAuthority(t)
	own.saveRoot(w, "roots/roots.pem")
	before := own.issue(w, relayName, relayName, time.Hour)
	w.addRelay(manualRelay(w, relay{name: "relay", hostName: relayName}))
	w.start("relay")
	w.startControl(w.headscaleMap("relay"))
	w.join("a", "b")
	w.carries(900, "derpd")
	presents := func(cert *x509.Certificate) func() error {
		return func() error {
			var got struct{ SHA256 string }
			if err := w.agent("a", &got, "leaf", relayName+":443", relayName); err != nil {
				return err
			}
			if want := fmt.Sprintf("%x", sha256.Sum256(cert.Raw)); got.SHA256 != want {
				return fmt.Errorf("the relay presents %s, want %s", got.SHA256, want)
			}
			return nil
		}
	}
	w.eventually("the certificate", presents(before))

	transfer := w.begin("a", "b")
	after := own.issue(w, relayName, relayName, time.Hour)
	replaced := time.Now()
	w.eventually("the new certificate", presents(after))
	took := time.Since(replaced)
	end := transfer.finish()
	// A client that loses its relay reconnects after half a second or more.
	if end.UDPSilence > 0.5 {
		t.Errorf("the replacement interrupted the traffic: %+v", end)
	}
	w.saw("new certificate served after %.1f s, %d MiB meanwhile, longest silence %.2f s", took.Seconds(), end.Bytes>>20, end.UDPSilence)
}

// manualRelay returns a relay with the certificate for its name in the world's certs
// directory.
func manualRelay(w *world, r relay) relay {
	env := map[string]string{
		"DERP_DOMAIN": r.hostName, "DERP_CERT_MODE": "manual", "DERP_CERT_DIR": "/etc/certs",
	}
	maps.Copy(env, r.env)
	r.env = env
	r.volumes = append(r.volumes, filepath.Join(w.dir, "certs")+":/etc/certs:ro")
	return r
}

// stunFollowsTLS lets the certificate of one region expire, and then that of the
// other, as after a failed renewal. STUN of the region must close, so that nodes
// choose the other region, and must open again with a valid certificate.
func stunFollowsTLS(t *testing.T, r *row) {
	w := newWorld(t, r)
	own := newAuthority(t)
	own.saveRoot(w, "roots/roots.pem")
	regions := map[string]struct {
		id   int
		name string
	}{"one": {901, "derp1.example.test"}, "two": {902, "derp2.example.test"}}
	var printed []string
	for _, code := range []string{"one", "two"} {
		name := regions[code].name
		own.issue(w, name, name, time.Hour)
		w.addRelay(manualRelay(w, relay{name: serviceOf(code), hostName: name, env: map[string]string{
			"DERP_REGION_ID": fmt.Sprint(regions[code].id), "DERP_REGION_CODE": code,
		}}))
		w.start(serviceOf(code))
		printed = append(printed, w.headscaleMap(serviceOf(code)))
	}
	w.startControl(printed...)
	w.join("a", "b")
	first := w.status("a").Self.Relay
	second := map[string]string{"one": "two", "two": "one"}[first]
	if second == "" {
		t.Fatalf("the home of a is %q", first)
	}

	leaves := func(from, to string) (closed, moved time.Duration) {
		const validity = 15 * time.Second // files are read again within 4 s
		name := regions[from].name
		replaced := time.Now()
		own.issue(w, name, name, validity)
		w.eventually("the certificate to expire", func() error {
			out, err := w.tryExec(serviceOf(from), "/derpd", "healthcheck")
			if err == nil || !strings.Contains(out, "not ready") {
				return fmt.Errorf("health says %s", out)
			}
			return nil
		})
		w.eventually("STUN of "+from+" to close", func() error {
			n, err := w.netcheck("a")
			if err == nil && (n.RegionLatency[regions[from].id] != 0 || n.RegionLatency[regions[to].id] == 0) {
				err = fmt.Errorf("netcheck finds %v", n.RegionLatency)
			}
			return err
		})
		closed = time.Since(replaced) - validity
		for _, node := range []string{"a", "b"} {
			w.eventually(node+" to move to "+to, func() error {
				w.exec(node, "/bin/tailscale", "debug", "restun") // by itself within half a minute
				if home := w.status(node).Self.Relay; home != to {
					return fmt.Errorf("its home is %q", home)
				}
				return nil
			})
		}
		moved = time.Since(replaced) - validity
		w.pings("a", "b", to)
		return closed, moved
	}
	closed, moved := leaves(first, second)
	w.saw("%s's certificate expired: STUN closed within %.1f s, nodes on %s within %.1f s", first, closed.Seconds(), second, moved.Seconds())

	own.issue(w, regions[first].name, regions[first].name, time.Hour)
	renewed := time.Now()
	w.sees("a", regions[first].id)
	w.saw("renewed: STUN open within %.1f s", time.Since(renewed).Seconds())
	_, moved = leaves(second, first)
	w.saw("and back on %s within %.1f s", first, moved.Seconds())
}

// serviceOf returns the service of the relay with this region code. The first one is
// compose.yaml's own.
func serviceOf(code string) string {
	if code == "one" {
		return "relay"
	}
	return "relay-" + code
}

// authority issues the certificates of a world's servers.
type authority struct {
	t    *testing.T
	root *tls.Certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	return &authority{t, testkit.NewAuthority(t)}
}

// issue writes a certificate for a name, and its key, into the world's files
// certs/FILE.crt and .key, and returns the certificate. The root ends the chain.
func (a *authority) issue(w *world, file, name string, validity time.Duration) *x509.Certificate {
	a.t.Helper()
	cert := testkit.NewCertificate(a.t, testkit.Certificate{Names: []string{name}, NotAfter: time.Now().Add(validity), Issuer: a.root})
	w.replace("certs/"+file+".key", string(testkit.KeyPEM(a.t, cert)))
	w.replace("certs/"+file+".crt", string(testkit.ChainPEM(cert, a.root)))
	return cert.Leaf
}

// saveRoot writes the root of the authority to a file, for clients.
func (a *authority) saveRoot(w *world, file string) {
	a.t.Helper()
	w.write(file, string(testkit.ChainPEM(a.root)))
}
