package node

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"tailscale.com/net/ktimeout"

	"derpd/cmd/derpd/internal/config"
)

const (
	// keepAlive is negative: accepted connections inherit the keepalive of the
	// listener, and package net must not set it again.
	keepAlive = -1

	// Both values are the defaults of package net.
	tcpKeepAliveInterval = 15 * time.Second
	tcpKeepAliveCount    = 9
)

// tcpOptions sets options on the listening socket. Accepted connections inherit
// them without further system calls.
func tcpOptions(options config.TCP) func(network, address string, c syscall.RawConn) error {
	userTimeout := ktimeout.UserTimeout(tcpUserTimeout)
	return func(network, address string, c syscall.RawConn) error {
		if err := userTimeout(network, address, c); err != nil {
			return err
		}
		var optionErr error
		if err := c.Control(func(fd uintptr) {
			for _, option := range []struct{ level, name, value int }{
				{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
				{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(tcpKeepAlive / time.Second)},
				{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(tcpKeepAliveInterval / time.Second)},
				{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, tcpKeepAliveCount},
			} {
				if err := unix.SetsockoptInt(int(fd), option.level, option.name, option.value); err != nil && optionErr == nil {
					optionErr = os.NewSyscallError("setsockopt", err)
				}
			}
			if options.Unsent > 0 {
				// Sandboxes such as gVisor lack the option, and derpd works without it.
				err := unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, options.Unsent)
				if err != nil && !errors.Is(err, unix.ENOPROTOOPT) && optionErr == nil {
					optionErr = os.NewSyscallError("setting TCP_NOTSENT_LOWAT", err)
				}
			}
			if options.Congestion == "" {
				return
			}
			if err := unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, options.Congestion); err != nil {
				optionErr = fmt.Errorf("DERP_TCP_CONGESTION: using %s: %w; allow it on the host with sysctl net.ipv4.tcp_allowed_congestion_control", options.Congestion, err)
			}
		}); err != nil {
			return err
		}
		return optionErr
	}
}
