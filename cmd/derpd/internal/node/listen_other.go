//go:build !linux

package node

import (
	"syscall"

	"tailscale.com/net/ktimeout"

	"derpd/cmd/derpd/internal/config"
)

// keepAlive is set on each accepted connection.
const keepAlive = tcpKeepAlive

// tcpOptions sets options on the listening socket. Only Linux has a choice of
// congestion control, which the configuration refuses elsewhere, and a limit of unsent
// bytes that accepted connections inherit.
func tcpOptions(config.TCP) func(network, address string, c syscall.RawConn) error {
	return ktimeout.UserTimeout(tcpUserTimeout)
}
