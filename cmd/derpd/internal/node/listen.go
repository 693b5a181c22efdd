package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"derpd/cmd/derpd/internal/config"
	"derpd/cmd/derpd/internal/host"
	"derpd/internal/accept"
)

// Both values are derper's defaults. A client that acknowledges nothing for
// tcpUserTimeout is disconnected. tcpKeepAlive is the interval of TCP keepalives;
// derpserver sends its own keepalives more often.
const (
	tcpUserTimeout = 15 * time.Second
	tcpKeepAlive   = 10 * time.Minute
)

// listeners are all sockets of the relay. http, health and stun are nil when
// off.
type listeners struct {
	https  net.Listener
	http   net.Listener
	admin  net.Listener
	health net.Listener
	stun   *net.UDPConn

	retried []*accept.Listener // all but stun, once retry was called
}

// BindError is a failure to listen on an address of the configuration.
type BindError struct{ error }

// Unwrap returns the cause.
func (e BindError) Unwrap() error { return e.error }

// listen binds everything or nothing. It returns all failures in a BindError.
func listen(ctx context.Context, c config.Listen) (*listeners, error) {
	var l listeners
	var errs []error
	tcp := func(variable, addr string, options config.TCP) net.Listener {
		if addr == "" {
			return nil
		}
		lc := net.ListenConfig{Control: tcpOptions(options), KeepAlive: keepAlive}
		lc.SetMultipathTCP(false) // MPTCP has no TCP_USER_TIMEOUT
		ln, err := lc.Listen(ctx, "tcp", addr)
		if err != nil {
			errs = append(errs, bindError(variable, addr, err))
			return nil
		}
		return ln
	}
	l.https = tcp("DERP_ADDR", c.HTTPS, c.TCP)
	l.http = tcp("DERP_HTTP_PORT", c.HTTP, config.TCP{})
	l.admin = tcp("DERP_ADMIN_ADDR", c.Admin, config.TCP{})
	l.health = tcp("DERP_HEALTH_ADDR", c.Health, config.TCP{})
	if c.STUN != "" {
		conn, err := new(net.ListenConfig).ListenPacket(ctx, "udp", c.STUN)
		if err != nil {
			errs = append(errs, bindError("DERP_STUN_PORT", c.STUN, err))
		} else {
			l.stun = conn.(*net.UDPConn)
		}
	}
	if len(errs) > 0 {
		l.close()
		return nil, BindError{errors.Join(errs...)}
	}
	return &l, nil
}

// retry makes every TCP listener survive the errors of accept. The public listeners
// leave descriptors to all others, because an orchestrator restarts a relay whose
// /livez does not answer. The health listener leaves some to the admin listener. The
// self-check, whose connections exempt reports, may use them all.
func (l *listeners) retry(exempt func(peer net.Addr) bool, log zerolog.Logger) {
	for _, of := range []struct {
		ln      *net.Listener
		name    string
		highest int
	}{
		{&l.https, "https", host.LastDescriptor(1)},
		{&l.http, "http", host.LastDescriptor(1)},
		{&l.health, "health", host.LastDescriptor(2)},
		{&l.admin, "admin", 0},
	} {
		if *of.ln != nil {
			retried := accept.Listen(*of.ln, accept.Config{Name: of.name, Highest: of.highest, Exempt: exempt, Log: log})
			*of.ln = retried
			l.retried = append(l.retried, retried)
		}
	}
}

// close closes every socket. A second call has no effect.
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

// ports are the bound ports.
func (l *listeners) ports() ports {
	p := ports{https: port(l.https.Addr())}
	if l.http != nil {
		p.http = port(l.http.Addr())
	}
	if l.stun != nil {
		p.stun = port(l.stun.LocalAddr())
	}
	return p
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

// port is the port of a TCP or UDP address.
func port(a net.Addr) int { return int(addrPort(a).Port()) }

// loopback is the address at which a probe in this process reaches a listener. It
// is the loopback address if the listener is bound to all addresses.
func loopback(a net.Addr) netip.AddrPort {
	ap := addrPort(a)
	addr := ap.Addr().Unmap()
	if addr.IsUnspecified() {
		// Go's wildcard socket accepts IPv4 wherever the system has it.
		addr = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return netip.AddrPortFrom(addr, ap.Port())
}

func addrPort(a net.Addr) netip.AddrPort {
	switch a := a.(type) {
	case *net.TCPAddr:
		return a.AddrPort()
	case *net.UDPAddr:
		return a.AddrPort()
	}
	return netip.AddrPort{}
}
