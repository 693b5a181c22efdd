package main

import (
	"context"
	"net"
	"net/netip"
	"time"

	"derpd/healthz"
)

// discoveryTimeout bounds the question for the public address.
const discoveryTimeout = 2 * time.Second

// found is what is known of the addresses under which this host is reached
// from outside. An address that is not valid is not known.
type found struct {
	v4, v6 netip.Addr
}

// discover asks the STUN servers, and takes the address of the outbound
// interface for a family that none of them answers in.
func discover(ctx context.Context, servers []string) found {
	ctx, cancel := context.WithTimeout(ctx, discoveryTimeout)
	defer cancel()
	var f found
	v6 := make(chan netip.Addr, 1)
	go func() { v6 <- publicAddress(ctx, "udp6", servers) }()
	f.v4 = publicAddress(ctx, "udp4", servers)
	f.v6 = <-v6
	if f.v4.IsValid() && !isPublic(f.v6) {
		// A unique local address leads nowhere from outside, and clients
		// would try it.
		f.v6 = netip.Addr{}
	}
	return f
}

// publicAddress is this host's address of one family. Behind a router that
// translates IPv4, the interface gives only a private address; the caller
// says so.
func publicAddress(ctx context.Context, network string, servers []string) netip.Addr {
	own := outbound(ctx, network)
	if !own.IsValid() || len(servers) == 0 {
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

// askSTUN is this host's address as one server sees it; not valid without an
// answer.
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

// outbound is the address of the interface that leads out; no packet is sent.
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

// isPublic reports whether the whole internet could reach addr.
func isPublic(addr netip.Addr) bool {
	return addr.IsGlobalUnicast() && !addr.IsPrivate() && !carrierNAT.Contains(addr)
}
