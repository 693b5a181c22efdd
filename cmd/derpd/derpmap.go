package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"

	"derpd/certs"
	"derpd/cmd/derpd/internal/host"
	"derpd/relay/derpmap"
)

// mapType is the media type of an answer of the admin listener's /derpmap: by
// it the command knows that it asked a derpd and nothing else on that port.
const mapType = "application/vnd.derpd.derpmap"

// ports are where the relay really listens; 0 for not at all.
type ports struct{ https, http, stun int }

// asConfigured are the ports of a relay that does not run.
func asConfigured(c *config) ports {
	return ports{portOf(c.addr), portOf(c.httpAddr), portOf(c.stunAddr)}
}

// portOf is the port of a validated address; 0 if there is none.
func portOf(addr string) int {
	_, port, _ := net.SplitHostPort(addr)
	n, _ := strconv.Atoi(port)
	return n
}

// publicHTTPSPort is what clients dial.
func (c *config) publicHTTPSPort(listening int) int {
	if c.publicTLS != 0 {
		return c.publicTLS
	}
	return listening
}

// publicNode describes the relay as clients see it, and what the person who
// pastes the map should know. pin is the CertName of a pinned certificate.
func publicNode(c *config, at ports, pin string, f host.Addresses) (derpmap.Node, []string) {
	n := c.node
	n.CertName = pin
	n.Port = c.publicHTTPSPort(at.https)
	n.STUNPort = outside(at.stun, c.publicSTUN)
	n.HTTPPort = outside(at.http, c.publicHTTP)

	for _, d := range c.domains {
		if addr, err := netip.ParseAddr(d); err == nil {
			f = withAddress(f, addr)
		}
	}
	var notes []string
	named := len(c.domains) > 0
	if named {
		n.HostName = c.domains[0]
	}
	if named && net.ParseIP(n.HostName) == nil && !f.V4.IsValid() && !f.V6.IsValid() {
		// A name: DNS knows the addresses, and follows when they change.
		if n.IPv4 == "" && n.IPv6 == "" {
			notes = append(notes, "Clients look "+n.HostName+" up in DNS. Set DERP_PUBLIC_IPV4 and DERP_PUBLIC_IPV6 to",
				"write the addresses here, so that they need no DNS to reach the relay.")
		}
	} else {
		n.IPv4 = known(n.IPv4, f.V4)
		n.IPv6 = known(n.IPv6, f.V6)
	}
	if !named {
		n.HostName = n.IPv4
		if n.HostName == derpmap.None {
			n.HostName = n.IPv6
		}
		if n.HostName == derpmap.None {
			n.HostName, n.IPv4 = "127.0.0.1", "127.0.0.1"
		}
	}
	for _, a := range []struct{ value, variable string }{{n.IPv4, "DERP_PUBLIC_IPV4"}, {n.IPv6, "DERP_PUBLIC_IPV6"}} {
		if addr, err := netip.ParseAddr(a.value); err == nil && !host.IsPublic(addr) {
			notes = append(notes, fmt.Sprintf("%s is a private address: only its own network reaches it.", addr),
				fmt.Sprintf("Set %s (or DERP_DOMAIN) to what clients can dial.", a.variable))
		}
	}
	if c.mode == modeOff {
		notes = append(notes, "TLS ends before derpd: what ends it must have a certificate for "+n.HostName+".")
	}
	if n.STUNPort == -1 {
		notes = append(notes, "Without STUN no client chooses this region as its home while another one answers.",
			"A second node of the region can answer STUN for this one: another Name, the same RegionID,",
			"the HostName of a STUN server near it, and STUNOnly true.")
	}
	if c.open() {
		notes = append(notes, "This relay is open: anybody who finds it can use it (DERP_VERIFY_CLIENTS).")
	}
	return n, notes
}

// withAddress sets the address of addr's family, unless it is known.
func withAddress(f host.Addresses, addr netip.Addr) host.Addresses {
	switch {
	case addr.Is4() && !f.V4.IsValid():
		f.V4 = addr
	case addr.Is6() && !f.V6.IsValid():
		f.V6 = addr
	}
	return f
}

// known is the configured address, else the one found, else none.
func known(configured string, addr netip.Addr) string {
	switch {
	case configured != "":
		return configured
	case addr.IsValid():
		return addr.String()
	}
	return derpmap.None
}

// outside is a port as clients see it; -1 for none.
func outside(listening, configured int) int {
	switch {
	case listening == 0:
		return -1
	case configured != 0:
		return configured
	}
	return listening
}

// needsDiscovery reports whether the public address must be found out: a
// domain leads clients to the relay by itself.
func (c *config) needsDiscovery() bool {
	return len(c.domains) == 0 && (c.node.IPv4 == "" || c.node.IPv6 == "")
}

// printMap is the command `derpd derpmap`. The running relay knows best; when
// there is none, the map is made from the configuration and the data directory.
func printMap(ctx context.Context, args, env []string, stdout, stderr io.Writer) error {
	flags := newFlags("derpmap", stderr)
	format := formatFlag(flags)
	if err := parseFlags(flags, args); err != nil {
		return err
	}
	c, err := loadConfig(env)
	if err != nil {
		return configError(err)
	}
	out, err := askRunning(ctx, c.admin, string(*format))
	if err != nil {
		out, err = mapOfStopped(ctx, c, string(*format))
	}
	if err != nil {
		return err
	}
	_, err = stdout.Write(out)
	return err
}

func mapOfStopped(ctx context.Context, c *config, format string) ([]byte, error) {
	pin := ""
	switch c.mode {
	case modePinned:
		m, err := certs.LoadPinned(c.pinned)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("no pinned certificate in %s yet: start the relay once, it makes one and prints the map", c.certDir)
		}
		if err != nil {
			return nil, err
		}
		pin = m.Status().Pin
	case modeManual:
		m, err := certs.LoadManual(c.manual)
		if err != nil {
			return nil, err
		}
		pin = m.Status().Pin
	}
	var f host.Addresses
	if c.needsDiscovery() {
		f = host.PublicAddresses(ctx, c.discovery)
	}
	n, notes := publicNode(c, asConfigured(c), pin, f)
	if c.meshed() {
		notes = append(notes, "The other nodes of DERP_MESH_WITH are missing: only a relay that runs asks them.")
	}
	return derpmap.Format(format, derpmap.New(n), notes)
}

// askRunning asks the relay that listens on the admin address.
func askRunning(ctx context.Context, admin, format string) ([]byte, error) {
	res, err := askAdmin(ctx, admin, "/derpmap?format="+url.QueryEscape(format))
	if err != nil {
		return nil, err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != mapType {
		return nil, fmt.Errorf("%s is not a derpd", admin)
	}
	return io.ReadAll(res.Body)
}
