package stun

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"reflect"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	upstream "tailscale.com/net/stun"

	"derpd/internal/testkit"
)

// put makes the i-th request of a batch, as recvmmsg would.
func (b *batch) put(i int, packet []byte, from netip.AddrPort) {
	r, in := &b.requests[i], &b.in[i]
	in.Len = uint32(copy(r.data[:], packet))
	in.Hdr.SetControllen(0)
	in.Hdr.Namelen = unix.SizeofSockaddrInet4
	binary.NativeEndian.PutUint16(r.name[:], unix.AF_INET)
	binary.BigEndian.PutUint16(r.name[2:], from.Port())
	copy(r.name[4:], from.Addr().AsSlice())
}

// withFD calls f with the descriptor of the server's socket.
func (s *Server) withFD(t *testing.T, f func(fd uintptr)) {
	t.Helper()
	raw, err := s.conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(f); err != nil {
		t.Fatal(err)
	}
}

func TestBatchesAreUsed(t *testing.T) {
	if s, _ := listen(t, "127.0.0.1:0", false, Config{}); !s.useBatches() {
		t.Error("no batches, want them on Linux")
	}
}

// A reply that the kernel refuses is lost and counted, and the others of its batch
// are sent.
func TestBatchWithWriteErrors(t *testing.T) {
	s, addr := listen(t, "0.0.0.0:0", false, Config{})
	server := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), addr.Port())
	first, second := dial(t, "127.0.0.1:0", server), dial(t, "127.0.0.1:0", server)
	broadcast := netip.MustParseAddrPort("127.255.255.255:9") // refused without SO_BROADCAST
	b := newBatch(s, nil)
	for i, from := range []netip.AddrPort{
		broadcast, first.LocalAddr().(*net.UDPAddr).AddrPort(), broadcast, broadcast, second.LocalAddr().(*net.UDPAddr).AddrPort(), broadcast,
	} {
		b.put(i, upstream.Request(upstream.TxID{byte(i)}), from)
	}
	s.withFD(t, func(fd uintptr) {
		if err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 0); err != nil {
			t.Fatal(err)
		}
		b.send(fd, b.answer(6))
	})
	first.expect(upstream.TxID{1})
	second.expect(upstream.TxID{4})
	if failed, sent := s.counters.writeError.Value(), s.counters.success.Value(); failed != 4 || sent != 2 {
		t.Errorf("counted %d failed and %d sent, want 4 and 2", failed, sent)
	}
	if n := s.counters.noLocalAddr.Value(); n != 6 {
		t.Errorf("counted %d requests without the address asked, want 6", n)
	}
}

// oneWake is a socket whose poller wakes once.
type oneWake struct{ syscall.RawConn }

func (c oneWake) Read(f func(fd uintptr) bool) error {
	return c.Control(func(fd uintptr) { f(fd) })
}

// One wake of the poller is enough for all requests that wait.
func TestBatchesAnswerAllThatWaits(t *testing.T) {
	s, addr := listen(t, "127.0.0.1:0", false, Config{})
	raw, err := s.conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, "127.0.0.1:0", addr)
	want := make([]upstream.TxID, 2*batchSize)
	for i := range want {
		want[i] = c.request()
	}
	if err := newBatch(s, oneWake{raw}).serve(t.Context()); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("the last read returned %v, want that nothing waits", err)
	}
	for _, tx := range want {
		c.expect(tx)
	}
}

// fullSocket is a socket without room to send, and the one that it sends to. UDP
// over the loopback interface always has room.
func fullSocket(t *testing.T) (full, reader int) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Close(pair[0])
		_ = unix.Close(pair[1])
	})
	if err := unix.SetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_SNDBUF, 1); err != nil { // the kernel's minimum
		t.Fatal(err)
	}
	for range 1_000_000 { // more than any buffer holds
		if err := unix.Send(pair[0], []byte("before"), unix.MSG_DONTWAIT); errors.Is(err, unix.EAGAIN) {
			return pair[0], pair[1]
		}
	}
	t.Fatal("the socket does not become full")
	return 0, 0
}

// numbered are replies that contain their own number.
func numbered(n int) []unix.Mmsghdr {
	replies := make([]unix.Mmsghdr, n)
	for i := range replies {
		text := []byte(strconv.Itoa(i))
		replies[i].Hdr.Iov = &unix.Iovec{Base: &text[0]}
		replies[i].Hdr.Iov.SetLen(len(text))
		replies[i].Hdr.SetIovlen(1)
	}
	return replies
}

// Replies wait for room to send, and arrive in order.
func TestRepliesWaitForRoom(t *testing.T) {
	var s Server
	s.counters.init()
	full, reader := fullSocket(t)
	const replies = 50
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		newBatch(&s, nil).send(uintptr(full), numbered(replies))
	}()
	select {
	case <-sent:
		t.Fatal("the replies did not wait")
	case <-time.After(50 * time.Millisecond):
	}
	begin := time.Now()
	buf := make([]byte, 100)
	for next := 0; next < replies; {
		n, err := unix.Read(reader, buf)
		if err != nil {
			t.Fatal(err)
		}
		switch string(buf[:n]) {
		case "before":
		case strconv.Itoa(next):
			next++
		default:
			t.Fatalf("reply %q, want %d", buf[:n], next)
		}
	}
	<-sent
	if took := time.Since(begin); took > time.Second { // a wait of 200 ms for every few replies is longer
		t.Errorf("sending took %s after there was room", took)
	}
	if got := s.counters.success.Value(); got != replies || s.counters.writeError.Value() != 0 {
		t.Errorf("counted %d sent and %d failed, want %d and 0", got, s.counters.writeError.Value(), replies)
	}
}

// Replies that have no room for long are lost together, so that the requests behind
// them do not wait.
func TestRepliesDoNotWaitForever(t *testing.T) {
	var s Server
	s.counters.init()
	full, _ := fullSocket(t)
	const replies = batchSize
	begin := time.Now()
	newBatch(&s, nil).send(uintptr(full), numbered(replies))
	if took := time.Since(begin); took < 100*time.Millisecond || took > 3*time.Second {
		t.Errorf("returned after %s, want it after 200 ms", took)
	}
	if got := s.counters.writeError.Value(); got != replies || s.counters.success.Value() != 0 {
		t.Errorf("counted %d failed and %d sent, want %d and 0", got, s.counters.success.Value(), replies)
	}
}

// Errors that ICMP leaves on the socket are counted, and end nothing.
func TestSocketErrors(t *testing.T) {
	onBothPaths(t, func(t *testing.T, singly bool) {
		s, addr := listen(t, "127.0.0.1:0", singly, Config{})
		s.withFD(t, func(fd uintptr) {
			if err := unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVERR, 1); err != nil {
				t.Fatal(err)
			}
		})
		start(t, s)
		testkit.Until(t, "a read error", func() bool {
			gone := dial(t, "127.0.0.1:0", addr)
			gone.request()
			_ = gone.Close()
			return s.counters.readError.Value() > 0
		})
		c := dial(t, "127.0.0.1:0", addr)
		c.expect(c.request())
	})
}

// A reply that cannot be sent singly is counted, and ends nothing.
func TestSingleWithWriteErrors(t *testing.T) {
	s, addr := serve(t, "127.0.0.1:0", true, Config{})
	c := dial(t, "127.0.0.1:0", addr)
	if err := s.conn.SetWriteDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	c.request()
	testkit.Until(t, "a write error", func() bool { return s.counters.writeError.Value() == 1 })
	if err := s.conn.SetWriteDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	c.expect(c.request())
	testkit.Until(t, "a success", func() bool { return s.counters.success.Value() == 1 })
}

// forbidden names the system call that a process of this test forbids itself, and
// the error that the call returns then.
const forbidden = "STUN_TEST_FORBIDDEN"

// A seccomp filter that forbids batches does not end STUN.
func TestFiltersOfSystemCalls(t *testing.T) {
	if what := os.Getenv(forbidden); what != "" {
		var call, errno uint32
		if _, err := fmt.Sscanf(what, "%d %d", &call, &errno); err != nil {
			t.Fatal(err)
		}
		forbid(t, call, errno)
		if s, _ := listen(t, "127.0.0.1:0", false, Config{}); s.useBatches() {
			t.Fatal("batches in spite of the filter")
		}
		_, addr := serve(t, "127.0.0.1:0", false, Config{})
		c := dial(t, "127.0.0.1:0", addr)
		c.expect(c.request())
		return
	}
	for _, call := range []int{unix.SYS_RECVMMSG, unix.SYS_SENDMMSG} {
		for _, errno := range []unix.Errno{unix.EPERM, unix.ENOSYS} {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
			cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d", forbidden, call, int(errno)))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("system call %d with %v: %v\n%s", call, errno, err, out)
			}
		}
	}
}

// forbid makes a system call return an error in all threads from now on.
func forbid(t *testing.T, call, errno uint32) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the number of the call
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: call, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | errno},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Skipf("no filters of system calls here: %v", err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, reflect.ValueOf(&program).Pointer()); errno != 0 {
		t.Skipf("no filters of system calls here: %v", errno)
	}
	runtime.KeepAlive(&program)
}
