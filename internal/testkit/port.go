package testkit

import (
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"syscall"
	"testing"
)

// firstPort and lastPort limit the ports of FreePort. They are below the ephemeral
// ports, which start at 32768 on Linux and at 49152 elsewhere. Any connection could
// take an ephemeral port before the program binds it, or during a restart.
const (
	firstPort = 20000
	lastPort  = 29999
)

// FreePort returns a port that no program uses for TCP or UDP on any address of this
// machine. It is for other programs, and for ports that must be known in advance. A
// server in the test's own process should bind port 0.
//
// The port stays reserved until the test ends: neither this process nor another one
// gets the same port from FreePort.
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

// reserve binds a TCP port on all IPv4 addresses, and fails if any other socket is
// bound to the port. It then sets SO_REUSEADDR, with which a server can still bind the
// port: the server's socket has the option too, and this socket never listens.
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
