package accept

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
)

// failing is a listener that fails with each of errs in turn, and then accepts one
// end of a pipe at every call.
type failing struct {
	errs   []error
	times  []time.Time // of the calls
	closed bool
}

func (l *failing) Accept() (net.Conn, error) {
	l.times = append(l.times, time.Now())
	if l.closed {
		return nil, net.ErrClosed
	}
	if len(l.errs) > 0 {
		err := l.errs[0]
		l.errs = l.errs[1:]
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: err}
	}
	conn, _ := net.Pipe()
	return conn, nil
}

func (l *failing) Close() error {
	l.closed = true
	return nil
}

func (l *failing) Addr() net.Addr { return &net.TCPAddr{} }

// No error of accept(2) ends a listener. The pauses double up to a second.
func TestErrorsAreRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := &failing{errs: []error{
			syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EPERM, syscall.ECONNABORTED,
			syscall.EPROTO, syscall.ENETDOWN, syscall.EHOSTUNREACH, errors.New("of a wrapper"),
		}}
		want := len(below.errs)
		var log bytes.Buffer
		l := Listen(below, Config{Name: "https", Log: zerolog.New(&log)})
		if _, err := l.Accept(); err != nil {
			t.Fatal(err)
		}
		if got := l.Failures(); got != uint64(want) || l.Refused() != 0 {
			t.Errorf("%d failures and %d refused, want %d and 0", got, l.Refused(), want)
		}
		pause := 5 * time.Millisecond
		for i := 1; i < len(below.times); i++ {
			if got := below.times[i].Sub(below.times[i-1]); got != pause {
				t.Errorf("pause %d is %s, want %s", i, got, pause)
			}
			pause = min(2*pause, time.Second)
		}
		if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), `"level":"warn"`) || !strings.Contains(log.String(), "too many open files") {
			t.Errorf("want one warning, got %s", log.String())
		}

		// The state of failure goes on while errors alternate with connections.
		for range 3 {
			below.errs = []error{syscall.EMFILE}
			begin := time.Now()
			if _, err := l.Accept(); err != nil || time.Since(begin) != 5*time.Millisecond {
				t.Fatalf("%v after %s, want the first pause after a success", err, time.Since(begin))
			}
		}
		<-time.After(settled)
		if _, err := l.Accept(); err != nil {
			t.Fatal(err)
		}
		if lines := strings.Split(strings.TrimSpace(log.String()), "\n"); len(lines) != 2 || !strings.Contains(lines[1], "works again") {
			t.Errorf("want one more line, got %s", log.String())
		}
		below.errs = []error{syscall.ENOMEM}
		if _, err := l.Accept(); err != nil || strings.Count(log.String(), "\n") != 3 {
			t.Errorf("%v; a new state was not logged: %s", err, log.String())
		}
	})
}

// Close ends a pause at once, and Accept with it.
func TestCloseEndsThePause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := &failing{}
		for range 20 {
			below.errs = append(below.errs, syscall.ENOBUFS)
		}
		l := Listen(below, Config{Log: zerolog.Nop()})
		ended := make(chan error)
		go func() {
			_, err := l.Accept()
			ended <- err
		}()
		<-time.After(5 * time.Second) // within a pause of a second
		synctest.Wait()
		begin := time.Now()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; !errors.Is(err, net.ErrClosed) || time.Since(begin) != 0 {
			t.Errorf("%v after %s", err, time.Since(begin))
		}
		if err := l.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
	})
}

// Connections with a descriptor above the highest are closed, without a pause, and
// the listener goes on.
func TestReserve(t *testing.T) {
	below, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	var exempt atomic.Pointer[string]
	l := Listen(below, Config{Name: "https", Highest: 500, Exempt: func(peer net.Addr) bool {
		addr := exempt.Load()
		return addr != nil && *addr == peer.String()
	}, Log: zerolog.New(&log)})
	defer func() { _ = l.Close() }()
	accepted := make(chan net.Conn)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- conn
		}
	}()
	dial := func() net.Conn {
		t.Helper()
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", below.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		return conn
	}
	dial()
	first := <-accepted
	defer func() { _ = first.Close() }()

	var taken []int
	giveBack := func() {
		for _, fd := range taken {
			_ = unix.Close(fd)
		}
		taken = nil
	}
	defer giveBack()
	for {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		taken = append(taken, fd)
		if fd > 500 {
			break
		}
	}
	for range 3 {
		if n, err := dial().Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, syscall.EAGAIN) {
			t.Errorf("a connection in the reserve: %d, %v", n, err)
		}
	}
	bound := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			_ = unix.Bind(int(fd), &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
			name, _ := unix.Getsockname(int(fd))
			addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(name.(*unix.SockaddrInet4).Port)).String()
			exempt.Store(&addr)
		})
	}}
	own, err := bound.DialContext(t.Context(), "tcp", below.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = own.Close() }()
	if exempted := <-accepted; exempted.RemoteAddr().String() != own.LocalAddr().String() {
		t.Errorf("accepted %s, want the exempt peer %s", exempted.RemoteAddr(), own.LocalAddr())
	} else {
		_ = exempted.Close()
	}
	if l.Refused() != 3 || l.Failures() != 0 {
		t.Errorf("%d refused, %d failures; want 3 and 0", l.Refused(), l.Failures())
	}
	if strings.Count(log.String(), "\n") != 1 {
		t.Errorf("want one line, got %s", log.String())
	}
	giveBack()
	dial()
	second := <-accepted
	_ = second.Close()
}
