package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"time"

	"derpd/certs"
	"derpd/cmd/derpd/internal/config"
	"derpd/cmd/derpd/internal/host"
	"derpd/healthz"
	"derpd/relay/derpmap"
)

// ports are the ports on which the relay listens; 0 for none.
type ports struct{ https, http, stun int }

// configuredPorts are the ports of a relay that does not run.
func configuredPorts(c config.Listen) ports {
	return ports{config.PortOf(c.HTTPS), config.PortOf(c.HTTP), config.PortOf(c.STUN)}
}

// publicNode describes the relay as clients see it. The notes are comments for
// the person who pastes the map. pin is the CertName of a pinned certificate. open is
// whether anybody may use the relay.
func publicNode(c *config.Config, at ports, pin string, found host.Addresses, open bool) (derpmap.Node, []string) {
	n := c.Region.Node
	n.CertName = pin
	n.Port = c.PublicHTTPSPort(at.https)
	n.STUNPort = publicPort(at.stun, c.Region.STUNPort)
	n.HTTPPort = publicPort(at.http, c.Region.HTTPPort)

	for _, d := range c.Domains {
		if addr, err := netip.ParseAddr(d); err == nil {
			found = withAddress(found, addr)
		}
	}
	var notes []string
	named := len(c.Domains) > 0
	if named {
		n.HostName = c.Domains[0]
	}
	if named && net.ParseIP(n.HostName) == nil && !found.V4.IsValid() && !found.V6.IsValid() {
		// DNS has the addresses of a name, and follows when they change.
		if n.IPv4 == "" && n.IPv6 == "" {
			notes = append(notes, "Clients look "+n.HostName+" up in DNS. Set DERP_PUBLIC_IPV4 and DERP_PUBLIC_IPV6 to",
				"write the addresses here, so that they need no DNS to reach the relay.")
		}
	} else {
		n.IPv4 = addressOrNone(n.IPv4, found.V4)
		n.IPv6 = addressOrNone(n.IPv6, found.V6)
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
	if c.Certificate.Mode == config.ModeOff {
		notes = append(notes, "TLS ends before derpd: what ends it must have a certificate for "+n.HostName+".")
	}
	if n.STUNPort == -1 {
		notes = append(notes, "Without STUN no client chooses this region as its home while another one answers.",
			"A second node of the region can answer STUN for this one: another Name, the same RegionID,",
			"the HostName of a STUN server near it, and STUNOnly true.")
	}
	if open {
		notes = append(notes, "This relay is open: anybody who finds it can use it (DERP_VERIFY_CLIENTS).")
	}
	return n, notes
}

// withAddress sets the address of addr's family, unless it is known.
func withAddress(a host.Addresses, addr netip.Addr) host.Addresses {
	switch {
	case addr.Is4() && !a.V4.IsValid():
		a.V4 = addr
	case addr.Is6() && !a.V6.IsValid():
		a.V6 = addr
	}
	return a
}

// addressOrNone is the configured address, else the one found, else none.
func addressOrNone(configured string, found netip.Addr) string {
	switch {
	case configured != "":
		return configured
	case found.IsValid():
		return found.String()
	}
	return derpmap.None
}

// publicPort is a port as clients see it; -1 for none.
func publicPort(listening, configured int) int {
	switch {
	case listening == 0:
		return -1
	case configured != 0:
		return configured
	}
	return listening
}

// loadPinned loads the pinned certificate. Without one, the error has the fix.
func loadPinned(c *config.Config) (certs.Manager, error) {
	m, err := certs.LoadPinned(c.Certificate.Pinned)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no pinned certificate in %s yet; start the relay once, which makes one and prints the map", c.Storage.CertDir)
	}
	return m, err
}

// loadManual loads the files of mode manual.
func loadManual(c *config.Config) (certs.Manager, error) {
	return certs.LoadManual(c.Certificate.Manual)
}

// StoppedMap is the map of a relay that does not run, made from its
// configuration and its data directory.
func StoppedMap(ctx context.Context, c *config.Config, format string) ([]byte, error) {
	load := func(*config.Config) (certs.Manager, error) { return nil, nil }
	switch c.Certificate.Mode {
	case config.ModePinned:
		load = loadPinned
	case config.ModeManual:
		load = loadManual
	}
	m, err := load(c)
	if err != nil {
		return nil, err
	}
	pin := ""
	var verdict healthz.Verdict
	if m != nil {
		s := m.Status()
		pin = s.Pin
		verdict = new(healthz.Judgements).Of(clients(c, pin), systemRoots, parseChain(s.Chain), time.Now())
	}
	n, notes := publicNode(c, configuredPorts(c.Listen), pin, publicAddresses(ctx, c), c.Open())
	notes = append(notes, verdictNotes(verdict)...)
	recorded, _ := readCertName(c.Storage.MapCertFile()) // the start of the relay reports the error
	notes = append(notes, recorded.next(pin, time.Now()).notes()...)
	if c.Meshed() {
		notes = append(notes, "The other nodes of DERP_MESH_WITH are missing: only a relay that runs asks them.")
	}
	return derpmap.Format(format, derpmap.New(n), notes)
}
