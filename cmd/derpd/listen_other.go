//go:build !linux

package main

import (
	"syscall"

	"tailscale.com/net/ktimeout"
)

// keepAlive is set on each connection.
const keepAlive = tcpKeepAlive

// tcpOptions sets the options of a listener. The congestion control is Linux's
// alone; elsewhere the configuration refuses it.
func tcpOptions(string) func(network, address string, c syscall.RawConn) error {
	return ktimeout.UserTimeout(tcpUserTimeout)
}
