//go:build linux

package testrelay

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	randv2 "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"time"

	"tailscale.com/net/stun"
	"tailscale.com/types/key"
)

// Names of the two servers in reports.
const (
	Derper = "derper"
	Derpd  = "derpd"
)

const (
	startWithin = 10 * time.Second
	retryAfter  = 100 * time.Microsecond
	askAgain    = 2 * time.Millisecond // wait for a STUN answer before the next request
	stopWithin  = 3 * time.Second      // a server that runs longer is killed
	maxAnswer   = 128                  // bytes
	logTail     = 4 << 10              // bytes of a failed server's log in the error
)

// loopback is the address of the servers and of the admin listener.
var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// Program is one of the two servers that are compared.
type Program struct {
	Name, Path string
	Args, Env  []string   // in addition to those of Describe
	Dir        string     // directory of the certificate and the keys
	Address    netip.Addr // listening address; 127.0.0.1 if it is not set
	CPUs       []int      // CPUs it may use; nil is all

	// Before is shell commands that the process runs before the program, such as
	// ulimit -n 256; empty for none.
	Before string

	Certificate *x509.Certificate

	Describe func(Program, Ports) (args, env []string)
}

// listen returns the listening address.
func (p Program) listen() netip.Addr {
	if p.Address.IsValid() {
		return p.Address
	}
	return loopback
}

// Ports are the ports of a server. Only derpd has the last one.
type Ports struct{ HTTPS, STUN, Admin int }

// DerperCommand returns derper's command line, without plain HTTP and without
// derper's default file of the mesh key.
func DerperCommand(p Program, at Ports) (args, env []string) {
	return []string{
		"-a", net.JoinHostPort(p.listen().String(), strconv.Itoa(at.HTTPS)), "-http-port", "-1",
		"-stun-port", strconv.Itoa(at.STUN), "-c", filepath.Join(p.Dir, "derper.key"),
		"-certmode", "manual", "-certdir", p.Dir, "-hostname", Hostname,
		"-mesh-psk-file", "", "-verify-clients=false",
	}, nil
}

// DerpdCommand returns derpd's environment for the same configuration.
func DerpdCommand(p Program, at Ports) (args, env []string) {
	return nil, []string{
		"DERP_ADDR=" + net.JoinHostPort(p.listen().String(), strconv.Itoa(at.HTTPS)), "DERP_HTTP_PORT=-1",
		"DERP_STUN_PORT=" + strconv.Itoa(at.STUN), "DERP_DATA_DIR=" + p.Dir,
		"DERP_ADMIN_ADDR=" + net.JoinHostPort("127.0.0.1", strconv.Itoa(at.Admin)),
		"DERP_CERT_MODE=manual", "DERP_CERT_DIR=" + p.Dir, "DERP_DOMAIN=" + Hostname,
		"DERP_VERIFY_CLIENTS=false",
	}
}

// Server is a running program.
type Server struct {
	*Program
	HTTPS, STUN, Admin netip.AddrPort
	PID                int
	Log                string          // path of its log
	Ended              <-chan struct{} // closed when the process has ended
	command            *exec.Cmd
}

// Target returns what a client has to know of the server.
func (s *Server) Target() Target { return Target{HTTPS: s.HTTPS, Certificate: s.Certificate} }

// Launch executes the program without waiting until it serves.
func (p *Program) Launch(ctx context.Context) (*Server, error) {
	at, err := freePorts()
	if err != nil {
		return nil, err
	}
	log, err := os.CreateTemp(p.Dir, p.Name+"-*.log")
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()

	args, env := p.Describe(*p, at)
	args = append(args, p.Args...)
	command := exec.CommandContext(ctx, p.Path, args...)
	if p.Before != "" {
		script := p.Before + ` && exec "$0" "$@"`
		command = exec.CommandContext(ctx, "/bin/sh", slices.Concat([]string{"-c", script, p.Path}, args)...)
	}
	command.Dir = p.Dir
	command.Env = slices.Concat([]string{"HOME=" + p.Dir, "PATH=" + os.Getenv("PATH")}, env, p.Env)
	if len(p.CPUs) > 0 {
		command.Env = append(command.Env, "GOMAXPROCS="+strconv.Itoa(len(p.CPUs)))
	}
	command.Stdout, command.Stderr = log, log
	// The kernel kills the server when this process ends for any reason.
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ended, err := StartOn(p.CPUs, command)
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", p.Name, err)
	}
	return &Server{
		Program: p, PID: command.Process.Pid, Log: log.Name(), command: command, Ended: ended,
		HTTPS: netip.AddrPortFrom(p.listen(), uint16(at.HTTPS)), STUN: netip.AddrPortFrom(p.listen(), uint16(at.STUN)),
		Admin: netip.AddrPortFrom(loopback, uint16(at.Admin)),
	}, nil
}

// Start executes the program and waits until it relays and answers STUN.
func (p *Program) Start(ctx context.Context) (*Server, error) {
	s, err := p.Launch(ctx)
	if err != nil {
		return nil, err
	}
	if err = s.AwaitDERP(ctx); err == nil {
		err = s.AwaitSTUN(ctx)
	}
	if err != nil {
		err = fmt.Errorf("%w%s", err, s.LastWords())
		s.Stop()
		return nil, err
	}
	return s, nil
}

// AwaitDERP returns after the first DERP handshake that succeeds. It retries almost
// without a delay, because the time of a start is measured too.
func (s *Server) AwaitDERP(ctx context.Context) error {
	private := key.NewNode()
	return s.await(ctx, "a DERP handshake", func(ctx context.Context) error {
		c, err := Dial(ctx, s.Target(), private, netip.Addr{})
		if err == nil {
			c.Close()
		}
		return err
	})
}

// AwaitSTUN returns after the first STUN answer to any of its requests.
func (s *Server) AwaitSTUN(ctx context.Context) error {
	conn, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(s.STUN))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	request, answer := stun.Request(stun.NewTxID()), make([]byte, maxAnswer)
	return s.await(ctx, "a STUN answer", func(context.Context) error {
		if _, err := conn.Write(request); err != nil {
			return err // refused: no server listens yet
		}
		if err := conn.SetReadDeadline(time.Now().Add(askAgain)); err != nil {
			return err
		}
		n, err := conn.Read(answer)
		if err != nil {
			return err
		}
		_, _, err = stun.ParseResponse(answer[:n])
		return err
	})
}

func (s *Server) await(ctx context.Context, what string, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-s.Ended:
			return fmt.Errorf("waiting for %s of %s: the process has ended", what, s.Name)
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s of %s: %w", what, s.Name, err)
		default:
			Pause(retryAfter)
		}
	}
}

// Stop ends the process and waits until it has ended.
func (s *Server) Stop() {
	defer func() { _ = os.Remove(s.Log) }()
	_ = s.command.Process.Signal(syscall.SIGTERM)
	timeout := time.NewTimer(stopWithin)
	defer timeout.Stop()
	select {
	case <-s.Ended:
	case <-timeout.C:
		_ = s.command.Process.Kill()
		<-s.Ended
	}
}

// LastWords returns the end of the server's log, for an error message.
func (s *Server) LastWords() string {
	b, err := os.ReadFile(s.Log)
	if err != nil || len(b) == 0 {
		return ""
	}
	return fmt.Sprintf("\nthe end of the log of %s:\n%s", s.Name, bytes.TrimSpace(b[max(0, len(b)-logTail):]))
}

// freePorts returns free ports. They are below the ephemeral ports, which the load may
// use at any time.
func freePorts() (Ports, error) {
	var found []int
	for range 100 {
		port := 20000 + randv2.IntN(10000)
		tcp, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
		if err != nil {
			continue
		}
		_ = tcp.Close()
		udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
		if err != nil {
			continue
		}
		_ = udp.Close()
		if found = append(found, port); len(found) == 3 {
			return Ports{found[0], found[1], found[2]}, nil
		}
	}
	return Ports{}, errors.New("no free ports on 127.0.0.1")
}

// StartOn starts a command that may run on these CPUs only. The channel is closed
// when the command has ended. A child inherits the CPUs of its parent thread, and is
// killed when that thread ends. For this reason each command has its own thread.
func StartOn(cpus []int, command *exec.Cmd) (ended <-chan struct{}, err error) {
	gone := make(chan struct{})
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, so the thread ends with this goroutine
		err := SetAffinity(0, cpus)
		if err == nil {
			err = command.Start()
		}
		started <- err
		if err == nil {
			_ = command.Wait()
		}
		close(gone)
	}()
	return gone, <-started
}
