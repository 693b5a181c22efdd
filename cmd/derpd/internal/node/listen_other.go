//go:build !linux

package node

import (
	"syscall"

	"tailscale.com/net/ktimeout"
)

// keepAlive is set on each accepted connection.
const keepAlive = tcpKeepAlive

// tcpOptions sets options on the listening socket. Only Linux has a choice of
// congestion control; the configuration refuses the variable elsewhere.
func tcpOptions(string) func(network, address string, c syscall.RawConn) error {
	return ktimeout.UserTimeout(tcpUserTimeout)
}
