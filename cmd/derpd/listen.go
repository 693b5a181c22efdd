package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
)

const (
	// tcpUserTimeout and tcpKeepAlive are derper's defaults: a client that
	// acknowledges nothing for this long is gone, and one that is silent is
	// asked this often (derpserver sends its own keepalives more often).
	tcpUserTimeout = 15 * time.Second
	tcpKeepAlive   = 10 * time.Minute
)

// listeners are all the sockets of the relay; http, health and stun may be nil.
type listeners struct {
	https  net.Listener
	http   net.Listener
	admin  net.Listener
	health net.Listener
	stun   *net.UDPConn
}

// listen binds everything or nothing.
func listen(ctx context.Context, c *config) (*listeners, error) {
	var l listeners
	var errs []error
	tcp := func(variable, addr string) net.Listener {
		if addr == "" {
			return nil
		}
		lc := net.ListenConfig{Control: tcpOptions(""), KeepAlive: keepAlive}
		if variable == "DERP_ADDR" {
			lc.Control = tcpOptions(c.congestion)
		}
		// MPTCP knows no TCP_USER_TIMEOUT.
		lc.SetMultipathTCP(false)
		ln, err := lc.Listen(ctx, "tcp", addr)
		if err != nil {
			errs = append(errs, bindError(variable, addr, err))
			return nil
		}
		return ln
	}
	l.https = tcp("DERP_ADDR", c.addr)
	l.http = tcp("DERP_HTTP_PORT", c.httpAddr)
	l.admin = tcp("DERP_ADMIN_ADDR", c.admin)
	l.health = tcp("DERP_HEALTH_ADDR", c.health)
	if c.stunAddr != "" {
		conn, err := new(net.ListenConfig).ListenPacket(ctx, "udp", c.stunAddr)
		if err != nil {
			errs = append(errs, bindError("DERP_STUN_PORT", c.stunAddr, err))
		} else {
			l.stun = conn.(*net.UDPConn)
		}
	}
	if len(errs) > 0 {
		l.close()
		return nil, errors.Join(errs...)
	}
	return &l, nil
}

// close closes what is open; closing twice is harmless.
func (l *listeners) close() {
	for _, ln := range []net.Listener{l.https, l.http, l.admin, l.health} {
		if ln != nil {
			_ = ln.Close()
		}
	}
	if l.stun != nil {
		_ = l.stun.Close()
	}
}

// bindError names the variable to change and the fix.
func bindError(variable, addr string, err error) error {
	cause := err
	if op, ok := errors.AsType[*net.OpError](err); ok {
		cause = op.Err
	}
	fix := ""
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		fix = "another program listens there: stop it, or choose another port"
	case errors.Is(err, syscall.EACCES):
		fix = fmt.Sprintf("uid %d may not listen below port 1024 here: choose ports from 1024 on, or allow it on the host with sysctl net.ipv4.ip_unprivileged_port_start=80 (containers on Docker's bridge network may)", os.Getuid())
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		fix = "no interface has this address: leave the host empty to listen on all"
	}
	if fix != "" {
		return fmt.Errorf("%s: listening on %s: %w; %s", variable, addr, cause, fix)
	}
	return fmt.Errorf("%s: listening on %s: %w", variable, addr, cause)
}

// port is the port of a listener; 0 for none.
func port(a net.Addr) int {
	switch a := a.(type) {
	case *net.TCPAddr:
		return a.Port
	case *net.UDPAddr:
		return a.Port
	}
	return 0
}

// loopback is where a probe in this process reaches a listener: its own
// address, or the loopback one if it listens on all.
func loopback(a net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.TCPAddr:
		ap = a.AddrPort()
	case *net.UDPAddr:
		ap = a.AddrPort()
	}
	addr := ap.Addr().Unmap()
	if addr.IsUnspecified() {
		// Go's wildcard socket takes both families where there are both.
		addr = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return netip.AddrPortFrom(addr, ap.Port())
}
