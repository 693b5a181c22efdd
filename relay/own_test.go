package relay

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// acceptOne returns the next connection of ln, which is open until the test ends.
func acceptOne(t *testing.T, ln net.Listener) net.Conn {
	t.Helper()
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// The relay recognizes its own connections from their accept to their end, and no
// other connections.
func TestDialSelf(t *testing.T) {
	for _, tt := range []struct{ listen, dial string }{
		{"127.0.0.1:0", "127.0.0.1"},
		{"127.0.0.2:0", "127.0.0.2"},
		{"[::1]:0", "::1"},
		{":0", "127.0.0.1"},
		{":0", "::1"},
	} {
		t.Run(tt.listen+" by "+tt.dial, func(t *testing.T) {
			ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", tt.listen)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = ln.Close() }()
			at := netip.AddrPortFrom(netip.MustParseAddr(tt.dial), ln.Addr().(*net.TCPAddr).AddrPort().Port())
			r := newRelay(t, Config{})
			var dialed []net.Conn
			for range 3 {
				conn, err := r.DialSelf(t.Context(), at)
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = conn.Close() }()
				dialed = append(dialed, conn)
				accepted := acceptOne(t, ln)
				if !r.Own(accepted.RemoteAddr()) {
					t.Errorf("peer %s is not the relay's own", accepted.RemoteAddr())
				}
			}
			stranger, err := new(net.Dialer).DialContext(t.Context(), "tcp", at.String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = stranger.Close() }()
			if peer := acceptOne(t, ln).RemoteAddr(); r.Own(peer) {
				t.Errorf("a stranger at %s is the relay's own", peer)
			}
			if newRelay(t, Config{}).Own(dialed[0].LocalAddr()) {
				t.Error("another relay owns the connection")
			}
			for i, conn := range dialed {
				peer := conn.LocalAddr()
				if err := conn.Close(); err != nil || r.Own(peer) {
					t.Errorf("after Close, %v: own is %t", err, r.Own(peer))
				}
				if n := len(r.own.open); n != len(dialed)-1-i {
					t.Errorf("%d own addresses after Close, want %d", n, len(dialed)-1-i)
				}
			}
		})
	}
}

// No stranger on the same machine gets the address of an own connection, whatever
// options the stranger's socket has.
func TestOwnAddressIsTaken(t *testing.T) {
	ln := listen(t)
	defer func() { _ = ln.Close() }()
	r := newRelay(t, Config{})
	own, err := r.DialSelf(t.Context(), ln.Addr().(*net.TCPAddr).AddrPort())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = own.Close() }()
	for _, host := range []string{"127.0.0.1", "", "::1"} {
		lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) {
				_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
				_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
			})
		}}
		addr := net.JoinHostPort(host, strconv.Itoa(own.LocalAddr().(*net.TCPAddr).Port))
		second, err := lc.Listen(t.Context(), "tcp", addr)
		if err == nil {
			_ = second.Close()
		}
		if host != "::1" && !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("a second socket at %s: %v", addr, err)
		}
	}
}

// An attempt that fails leaves nothing behind.
func TestDialSelfFails(t *testing.T) {
	ln := listen(t)
	at := ln.Addr().(*net.TCPAddr).AddrPort()
	_ = ln.Close()
	r := newRelay(t, Config{})
	if conn, err := r.DialSelf(t.Context(), at); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v, %v", conn, err)
	}
	if _, err := r.DialSelf(t.Context(), netip.MustParseAddrPort("192.0.2.1:443")); !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("an address of another machine: %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.DialSelf(ended, at); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of the context: %v", err)
	}
	if len(r.own.open) != 0 {
		t.Errorf("%d own addresses left", len(r.own.open))
	}
}
