//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
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
	derper = "derper"
	derpd  = "derpd"
)

const (
	hostname    = "derp.example.com" // name in the certificate, never resolved
	startWithin = 10 * time.Second
	retryAfter  = 100 * time.Microsecond
	askAgain    = 2 * time.Millisecond // wait for a STUN answer before the next request
	stopWithin  = 3 * time.Second      // a server that runs longer is killed
	logTail     = 4 << 10              // bytes of a failed server's log in the error
)

// program is one of the two servers that are compared.
type program struct {
	name, path string
	env        []string
	dir        string     // directory of the certificate and the keys
	address    netip.Addr // listening address; 127.0.0.1 if it is not set
	cpus       []int      // CPUs it may use; nil is all

	certificate *x509.Certificate

	describe func(program, ports) (args, env []string)
}

// listen returns the listening address.
func (p program) listen() netip.Addr {
	if p.address.IsValid() {
		return p.address
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// ports are the ports of a server.
type ports struct{ https, stun, admin int }

// derperCommand returns derper's command line, without plain HTTP and without
// derper's default file of the mesh key.
func derperCommand(p program, at ports) (args, env []string) {
	return []string{
		"-a", net.JoinHostPort(p.listen().String(), strconv.Itoa(at.https)), "-http-port", "-1",
		"-stun-port", strconv.Itoa(at.stun), "-c", filepath.Join(p.dir, "derper.key"),
		"-certmode", "manual", "-certdir", p.dir, "-hostname", hostname,
		"-mesh-psk-file", "", "-verify-clients=false",
	}, nil
}

// derpdCommand returns derpd's environment for the same configuration.
func derpdCommand(p program, at ports) (args, env []string) {
	return nil, []string{
		"DERP_ADDR=" + net.JoinHostPort(p.listen().String(), strconv.Itoa(at.https)), "DERP_HTTP_PORT=-1",
		"DERP_STUN_PORT=" + strconv.Itoa(at.stun), "DERP_DATA_DIR=" + p.dir,
		"DERP_ADMIN_ADDR=" + net.JoinHostPort("127.0.0.1", strconv.Itoa(at.admin)),
		"DERP_CERT_MODE=manual", "DERP_CERT_DIR=" + p.dir, "DERP_DOMAIN=" + hostname,
		"DERP_VERIFY_CLIENTS=false",
	}
}

// server is a running program.
type server struct {
	*program
	https, stun netip.AddrPort
	pid         int
	log         string // path of its log
	command     *exec.Cmd
	ended       <-chan struct{} // closed when the process has ended
}

// launch executes the program without waiting until it serves.
func (p *program) launch(ctx context.Context) (*server, error) {
	at, err := freePorts()
	if err != nil {
		return nil, err
	}
	log, err := os.CreateTemp(p.dir, p.name+"-*.log")
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()

	args, env := p.describe(*p, at)
	command := exec.CommandContext(ctx, p.path, args...)
	command.Dir = p.dir
	command.Env = slices.Concat([]string{"HOME=" + p.dir, "PATH=" + os.Getenv("PATH")}, env, p.env)
	if len(p.cpus) > 0 {
		command.Env = append(command.Env, "GOMAXPROCS="+strconv.Itoa(len(p.cpus)))
	}
	command.Stdout, command.Stderr = log, log
	// The kernel kills the server when this process ends for any reason.
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ended, err := startOn(p.cpus, command)
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", p.name, err)
	}
	return &server{
		program: p, pid: command.Process.Pid, log: log.Name(), command: command, ended: ended,
		https: netip.AddrPortFrom(p.listen(), uint16(at.https)), stun: netip.AddrPortFrom(p.listen(), uint16(at.stun)),
	}, nil
}

// start executes the program and waits until it relays and answers STUN.
func (p *program) start(ctx context.Context) (*server, error) {
	s, err := p.launch(ctx)
	if err != nil {
		return nil, err
	}
	if err = s.awaitDERP(ctx); err == nil {
		err = s.awaitSTUN(ctx)
	}
	if err != nil {
		err = fmt.Errorf("%w%s", err, s.lastWords())
		s.stop()
		return nil, err
	}
	return s, nil
}

// awaitDERP returns after the first DERP handshake that succeeds. It retries almost
// without a delay, because the time of a start is measured too.
func (s *server) awaitDERP(ctx context.Context) error {
	private := key.NewNode()
	return s.await(ctx, "a DERP handshake", func(ctx context.Context) error {
		c, err := dial(ctx, s, private, netip.Addr{}, false)
		if err == nil {
			c.close()
		}
		return err
	})
}

// awaitSTUN returns after the first STUN answer to any of its requests.
func (s *server) awaitSTUN(ctx context.Context) error {
	conn, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(s.stun))
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
		_, err = answerTo(answer[:n])
		return err
	})
}

func (s *server) await(ctx context.Context, what string, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-s.ended:
			return fmt.Errorf("waiting for %s of %s: the process has ended", what, s.name)
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s of %s: %w", what, s.name, err)
		default:
			pause(retryAfter)
		}
	}
}

// stop ends the process and waits until it has ended.
func (s *server) stop() {
	defer func() { _ = os.Remove(s.log) }()
	_ = s.command.Process.Signal(syscall.SIGTERM)
	timeout := time.NewTimer(stopWithin)
	defer timeout.Stop()
	select {
	case <-s.ended:
	case <-timeout.C:
		_ = s.command.Process.Kill()
		<-s.ended
	}
}

// lastWords returns the end of the server's log, for an error message.
func (s *server) lastWords() string {
	b, err := os.ReadFile(s.log)
	if err != nil || len(b) == 0 {
		return ""
	}
	return fmt.Sprintf("\nthe end of the log of %s:\n%s", s.name, bytes.TrimSpace(b[max(0, len(b)-logTail):]))
}

// freePorts returns free ports. They are below the ephemeral ports, which the load may
// use at any time.
func freePorts() (ports, error) {
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
			return ports{found[0], found[1], found[2]}, nil
		}
	}
	return ports{}, errors.New("no free ports on 127.0.0.1")
}

// startOn starts a command that may run on these CPUs only. The channel is closed
// when the command has ended. A child inherits the CPUs of its parent thread, and is
// killed when that thread ends. For this reason each command has its own thread.
func startOn(cpus []int, command *exec.Cmd) (ended <-chan struct{}, err error) {
	gone := make(chan struct{})
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, so the thread ends with this goroutine
		err := setAffinity(0, cpus)
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

// makeCertificate writes the certificate of both servers and its P-256 key to dir,
// with the file names that both servers expect.
func makeCertificate(dir string) (*x509.Certificate, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: hostname}, DNSNames: []string{hostname},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, err
	}
	for name, block := range map[string]*pem.Block{
		hostname + ".crt": {Type: "CERTIFICATE", Bytes: der},
		hostname + ".key": {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			return nil, err
		}
	}
	return x509.ParseCertificate(der)
}

// share returns the number of CPUs of the server. The load has the same number.
// Without pinning, both use all CPUs.
func (p *program) share() float64 {
	if len(p.cpus) > 0 {
		return float64(len(p.cpus))
	}
	return float64(runtime.NumCPU())
}
