package host

import (
	"context"
	"net"
	"net/netip"
	"time"

	"derpd/healthz"
)

// addressTimeout bounds [PublicAddresses].
const addressTimeout = 2 * time.Second

// Addresses are the addresses under which others reach this machine. An
// invalid address is unknown.
type Addresses struct {
	V4, V6 netip.Addr
}

// List returns the known addresses, IPv4 first.
func (a Addresses) List() []netip.Addr {
	var list []netip.Addr
	for _, addr := range []netip.Addr{a.V4, a.V6} {
		if addr.IsValid() {
			list = append(list, addr)
		}
	}
	return list
}

// PublicAddresses asks the STUN servers, each HOST:PORT, for this machine's
// addresses. A family without any answer gets the address of the outbound
// interface, which may be private. It takes at most two seconds.
func PublicAddresses(ctx context.Context, servers []string) Addresses {
	ctx, cancel := context.WithTimeout(ctx, addressTimeout)
	defer cancel()
	var a Addresses
	v6 := make(chan netip.Addr, 1)
	go func() { v6 <- publicAddress(ctx, "udp6", servers) }()
	a.V4 = publicAddress(ctx, "udp4", servers)
	a.V6 = <-v6
	if a.V4.IsValid() && !IsPublic(a.V6) {
		// Clients outside cannot reach a unique local address, but would
		// try it.
		a.V6 = netip.Addr{}
	}
	return a
}

// publicAddress is this machine's address of one family. Behind a router that
// translates IPv4 the interface has only a private address; the caller warns
// about that.
func publicAddress(ctx context.Context, network string, servers []string) netip.Addr {
	own := outbound(ctx, network)
	if !own.IsValid() {
		return own
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan netip.Addr, len(servers))
	for _, server := range servers {
		go func() { answers <- askSTUN(ctx, network, server) }()
	}
	for range servers {
		if addr := <-answers; addr.IsValid() {
			return addr
		}
	}
	return own
}

// askSTUN returns this machine's address as one STUN server sees it. The address
// is invalid when the server does not answer.
func askSTUN(ctx context.Context, network, server string) netip.Addr {
	conn, err := new(net.Dialer).DialContext(ctx, network, server)
	if err != nil {
		return netip.Addr{}
	}
	seen, _, err := healthz.AskSTUN(ctx, conn)
	if err != nil {
		return netip.Addr{}
	}
	return seen.Addr()
}

// outbound is the address of the interface that leads to the internet. It sends
// no packet.
func outbound(ctx context.Context, network string) netip.Addr {
	target := "198.51.100.1:9" // TEST-NET-2, RFC 5737
	if network == "udp6" {
		target = "[2001:db8::1]:9" // RFC 3849
	}
	conn, err := new(net.Dialer).DialContext(ctx, network, target)
	if err != nil {
		return netip.Addr{}
	}
	defer func() { _ = conn.Close() }()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
}

var carrierNAT = netip.MustParsePrefix("100.64.0.0/10") // RFC 6598

// IsPublic reports whether addr is routable on the internet.
func IsPublic(addr netip.Addr) bool {
	return addr.IsGlobalUnicast() && !addr.IsPrivate() && !carrierNAT.Contains(addr)
}
