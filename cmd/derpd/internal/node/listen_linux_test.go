package node

import (
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"derpd/cmd/derpd/internal/config"
)

// TestTCPOptions reads the socket options of an accepted connection, which come
// from the listener.
func TestTCPOptions(t *testing.T) {
	data, err := os.ReadFile("/proc/sys/net/ipv4/tcp_available_congestion_control")
	if err != nil {
		t.Fatal(err)
	}
	for _, congestion := range []string{"", "reno"} {
		if !strings.Contains(string(data), congestion) {
			t.Logf("the kernel has no %s", congestion)
			continue
		}
		l, err := listen(t.Context(), config.Listen{HTTPS: "127.0.0.1:0", Admin: "127.0.0.1:0", TCP: config.TCP{Congestion: congestion, Unsent: 16 << 10}})
		if err != nil {
			t.Fatal(err)
		}
		defer l.close()
		client, err := new(net.Dialer).DialContext(t.Context(), "tcp", l.https.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = client.Close() }()
		conn, err := l.https.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		raw, err := conn.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := raw.Control(func(fd uintptr) {
			for name, option := range map[string]struct{ level, name, want int }{
				"SO_PROTOCOL":       {unix.SOL_SOCKET, unix.SO_PROTOCOL, unix.IPPROTO_TCP}, // not MPTCP
				"SO_KEEPALIVE":      {unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
				"TCP_KEEPIDLE":      {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 600},
				"TCP_KEEPINTVL":     {unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15},
				"TCP_KEEPCNT":       {unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 9},
				"TCP_NODELAY":       {unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
				"TCP_NOTSENT_LOWAT": {unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, 16 << 10},
				"TCP_USER_TIMEOUT":  {unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(15 * time.Second / time.Millisecond)},
			} {
				if got, err := unix.GetsockoptInt(int(fd), option.level, option.name); err != nil || got != option.want {
					t.Errorf("%s is %d, %v; want %d", name, got, err, option.want)
				}
			}
			got, err := unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
			if err != nil || congestion != "" && got != congestion {
				t.Errorf("congestion control is %q, %v; want %q", got, err, congestion)
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
}
