package testkit

import (
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"syscall"
	"testing"
)

// Ports of FreePort lie below the range from which systems choose a port for a
// client, or for a server that asks for port 0 (from 32768 on Linux, from 49152
// elsewhere). A port of that range could be taken by any connection before the
// program binds it, or while the program is restarted.
const (
	firstPort = 20000
	lastPort  = 29999
)

// FreePort returns a port that no program uses for TCP or UDP on any address of
// this machine. It is for programs that bind by themselves, and for ports that
// must be known in advance. A server in the test's own process binds port 0.
//
// The port stays reserved until the test ends: FreePort does not return it
// again, in this process or another one.
func FreePort(t testing.TB) int {
	t.Helper()
	for range 100 {
		port := firstPort + rand.IntN(lastPort-firstPort+1)
		release, err := reserve(port)
		if err != nil {
			continue
		}
		t.Cleanup(release)
		udp, err := new(net.ListenConfig).ListenPacket(t.Context(), "udp", fmt.Sprintf(":%d", port))
		if err != nil {
			continue
		}
		_ = udp.Close()
		return port
	}
	t.Fatalf("no free port from %d to %d", firstPort, lastPort)
	return 0
}

// FreeAddr returns 127.0.0.1 with a port of [FreePort].
func FreeAddr(t testing.TB) string {
	t.Helper()
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(FreePort(t)))
}

// reserve binds a TCP port on all IPv4 addresses, and fails if any other socket
// is bound to the port. The option SO_REUSEADDR is set only after that: then a
// server can bind the port, since its own socket has the option too and this
// socket never listens.
func reserve(port int) (release func(), err error) {
	syscall.ForkLock.RLock()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, err
	}
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Port: port}); err != nil {
		_ = syscall.Close(fd)
		return nil, err
	}
	if err := syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1); err != nil {
		_ = syscall.Close(fd)
		return nil, err
	}
	return func() { _ = syscall.Close(fd) }, nil
}
