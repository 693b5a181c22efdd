//go:build linux

package relay_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	stdlog "log"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"
	"time"
	"unsafe"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
	"tailscale.com/net/stun"
	"tailscale.com/net/stunserver"

	"derpd/relay"
)

const (
	stunSeries = 5                      // alternations
	stunRound  = 300 * time.Millisecond // of one server in one alternation
)

// BenchmarkSTUNBesideUpstream runs upstream's server and this one by turns, each
// in a process of its own, and reports the medians of the ratios: answers per
// second of the server's CPU, and answers per second of time. One iteration is
// a whole series:
//
//	go test -run '^$' -bench BesideUpstream -benchtime 1x ./relay
func BenchmarkSTUNBesideUpstream(b *testing.B) {
	for _, bb := range []struct {
		name         string
		burst, conns int
	}{{"single", 1, 1}, {"burst16", 16, 1}, {"burst16x4", 16, 4}} {
		b.Run(bb.name, func(b *testing.B) {
			var perCPU, perSecond, cpu [2][]float64
			var cpuRatio, rateRatio []float64
			servers := [2]*stunProcess{startSTUNProcess(b, "upstream"), startSTUNProcess(b, "derpd")}
			for range b.N {
				for range stunSeries {
					for i, s := range servers {
						answers, took, used := s.load(b, bb.burst, bb.conns)
						perCPU[i] = append(perCPU[i], float64(answers)/used.Seconds())
						perSecond[i] = append(perSecond[i], float64(answers)/took.Seconds())
						cpu[i] = append(cpu[i], float64(used.Nanoseconds())/float64(answers))
					}
					last := len(perCPU[0]) - 1
					cpuRatio = append(cpuRatio, perCPU[1][last]/perCPU[0][last])
					rateRatio = append(rateRatio, perSecond[1][last]/perSecond[0][last])
				}
			}
			b.ReportMetric(0, "ns/op") // of no interest
			b.ReportMetric(median(cpuRatio), "answers/CPU-s-ratio")
			b.ReportMetric(slices.Min(cpuRatio), "lowest-ratio")
			b.ReportMetric(slices.Max(cpuRatio), "highest-ratio")
			b.ReportMetric(median(rateRatio), "answers/s-ratio")
			b.ReportMetric(median(cpu[0]), "upstream-CPU-ns/answer")
			b.ReportMetric(median(cpu[1]), "derpd-CPU-ns/answer")
		})
	}
}

func median(list []float64) float64 {
	sorted := slices.Sorted(slices.Values(list))
	return sorted[len(sorted)/2]
}

// serverVariable names the server that this binary is to be, for the benchmark.
const serverVariable = "STUN_BENCHMARK_SERVER"

// TestSTUNServerProcess is no test: it is a server in a process of its own, which
// prints its port, and then its CPU time in microseconds for each line that it
// reads.
func TestSTUNServerProcess(t *testing.T) {
	kind := os.Getenv(serverVariable)
	if kind == "" {
		t.Skip("this is for the benchmark")
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	var addr net.Addr
	switch kind {
	case "upstream":
		stdlog.SetOutput(io.Discard)
		s := stunserver.New(ctx)
		if err := s.Listen(":0"); err != nil {
			t.Fatal(err)
		}
		addr = s.LocalAddr()
		go func() { ended <- s.Serve() }()
	case "derpd":
		conn, err := net.ListenUDP("udp", nil)
		if err != nil {
			t.Fatal(err)
		}
		s, err := relay.NewSTUN(relay.STUNConfig{Conn: conn, Log: zerolog.Nop(), Gateways: []netip.Addr{netip.MustParseAddr("172.17.0.1")}})
		if err != nil {
			t.Fatal(err)
		}
		s.SetOpen(true)
		addr = conn.LocalAddr()
		go func() { ended <- s.Run(ctx) }()
	default:
		t.Fatalf("no server is called %q", kind)
	}
	fmt.Println(addr.(*net.UDPAddr).Port)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		var used unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &used); err != nil {
			t.Fatal(err)
		}
		fmt.Println((used.Utime.Nano() + used.Stime.Nano()) / 1000)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

type stunProcess struct {
	port  int
	stdin io.Writer
	lines *bufio.Scanner
}

func startSTUNProcess(b *testing.B, kind string) *stunProcess {
	b.Helper()
	// It ends when its input does, after the context.
	cmd := exec.CommandContext(context.WithoutCancel(b.Context()), os.Args[0], "-test.run=^TestSTUNServerProcess$")
	cmd.Env = append(os.Environ(), serverVariable+"="+kind)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	s := &stunProcess{stdin: stdin, lines: bufio.NewScanner(stdout)}
	b.Cleanup(func() {
		_ = stdin.Close()
		_, _ = io.Copy(io.Discard, stdout)
		if err := cmd.Wait(); err != nil {
			b.Error(err)
		}
	})
	s.port = s.number(b)
	return s
}

func (s *stunProcess) number(b *testing.B) int {
	b.Helper()
	if !s.lines.Scan() {
		b.Fatal("the server has ended")
	}
	n, err := strconv.Atoi(s.lines.Text())
	if err != nil {
		b.Fatal(err)
	}
	return n
}

// cpu is what the server has used since its start.
func (s *stunProcess) cpu(b *testing.B) time.Duration {
	b.Helper()
	if _, err := fmt.Fprintln(s.stdin); err != nil {
		b.Fatal(err)
	}
	return time.Duration(s.number(b)) * time.Microsecond
}

// load asks in bursts from each of the connections, and sends the next burst
// when the one before is answered.
func (s *stunProcess) load(b *testing.B, burst, conns int) (answers int, took, cpu time.Duration) {
	b.Helper()
	type result struct {
		answers int
		err     error
	}
	before, start := s.cpu(b), time.Now()
	results := make(chan result, conns)
	for range conns {
		go func() {
			n, err := askInBursts(s.port, burst, start.Add(stunRound))
			results <- result{n, err}
		}()
	}
	for range conns {
		r := <-results
		if r.err != nil {
			b.Fatal(r.err)
		}
		answers += r.answers
	}
	if answers == 0 {
		b.Fatal("no answers")
	}
	return answers, time.Since(start), s.cpu(b) - before
}

// askInBursts sends each burst by one system call, so that it is there as a
// whole, on a blocking socket, to be cheap.
func askInBursts(port, burst int, until time.Time) (answers int, err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return 0, err
	}
	// An answer that was lost must not end the series.
	timeout := unix.NsecToTimeval((100 * time.Millisecond).Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return 0, err
	}
	type message struct {
		iov    unix.Iovec
		packet [64]byte
	}
	memory := make([]struct{ request, response message }, burst)
	out, in := make([]unix.Mmsghdr, burst), make([]unix.Mmsghdr, burst)
	tx := make([]stun.TxID, burst)
	for i := range memory {
		tx[i] = stun.NewTxID()
		m := &memory[i]
		m.request.iov.Base, m.response.iov.Base = &m.request.packet[0], &m.response.packet[0]
		m.request.iov.SetLen(copy(m.request.packet[:], stun.Request(tx[i])))
		m.response.iov.SetLen(len(m.response.packet))
		out[i].Hdr.Iov, in[i].Hdr.Iov = &m.request.iov, &m.response.iov
		out[i].Hdr.SetIovlen(1)
		in[i].Hdr.SetIovlen(1)
	}
	for time.Now().Before(until) {
		for sent := 0; sent < burst; {
			n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&out[sent])), uintptr(burst-sent), 0, 0, 0)
			if errno != 0 && errno != unix.EINTR {
				return answers, errno
			}
			if errno == 0 {
				sent += int(n)
			}
		}
		for got := 0; got < burst; {
			n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&in[got])), uintptr(burst-got), unix.MSG_WAITFORONE, 0, 0)
			if errno == unix.EAGAIN {
				break
			}
			if errno != 0 && errno != unix.EINTR {
				return answers, errno
			}
			for i := got; errno == 0 && i < got+int(n); i++ {
				packet := memory[i].response.packet[:in[i].Len]
				if len(packet) != 32 || !slices.ContainsFunc(tx, func(tx stun.TxID) bool { return bytes.Equal(packet[8:20], tx[:]) }) {
					return answers, fmt.Errorf("an answer that nobody asked for: %x", packet)
				}
			}
			if errno == 0 {
				got += int(n)
				answers += int(n)
			}
		}
	}
	return answers, nil
}
