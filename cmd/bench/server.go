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

// The names of the two, as reports have them.
const (
	derper = "derper"
	derpd  = "derpd"
)

const (
	hostname    = "derp.example.com" // in the certificate; nobody resolves it
	startWithin = 10 * time.Second
	retryAfter  = 100 * time.Microsecond
	askAgain    = 2 * time.Millisecond // a STUN server that was silent
	stopWithin  = 3 * time.Second      // before a server is killed
	logTail     = 4 << 10              // of a server that failed, in bytes
)

// program is one of the two servers that are compared.
type program struct {
	name, path string
	env        []string
	dir        string     // where the certificate is, and where keys are kept
	address    netip.Addr // where it listens; 127.0.0.1 if it is not set
	cpus       []int      // where it may run; nil is anywhere

	certificate *x509.Certificate // what it must show

	describe func(program, ports) (args, env []string)
}

// listen is the address on which it listens.
func (p program) listen() netip.Addr {
	if p.address.IsValid() {
		return p.address
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// ports are where a server listens.
type ports struct{ https, stun, admin int }

// derperCommand is derper as it is run by hand, without what only needs time:
// plain HTTP, and the mesh key that it looks for by default.
func derperCommand(p program, at ports) (args, env []string) {
	return []string{
		"-a", net.JoinHostPort(p.listen().String(), strconv.Itoa(at.https)), "-http-port", "-1",
		"-stun-port", strconv.Itoa(at.stun), "-c", filepath.Join(p.dir, "derper.key"),
		"-certmode", "manual", "-certdir", p.dir, "-hostname", hostname,
		"-mesh-psk-file", "", "-verify-clients=false",
	}, nil
}

// derpdCommand is derpd doing the same.
func derpdCommand(p program, at ports) (args, env []string) {
	return nil, []string{
		"DERP_ADDR=" + net.JoinHostPort(p.listen().String(), strconv.Itoa(at.https)), "DERP_HTTP_PORT=-1",
		"DERP_STUN_PORT=" + strconv.Itoa(at.stun), "DERP_DATA_DIR=" + p.dir,
		"DERP_ADMIN_ADDR=" + net.JoinHostPort("127.0.0.1", strconv.Itoa(at.admin)),
		"DERP_CERT_MODE=manual", "DERP_CERT_DIR=" + p.dir, "DERP_DOMAIN=" + hostname,
		"DERP_VERIFY_CLIENTS=false",
	}
}

// server is a program that runs.
type server struct {
	*program
	https, stun netip.AddrPort
	pid         int
	log         string // file
	command     *exec.Cmd
	ended       <-chan struct{} // closed when the process is gone
}

// launch executes the program and does not wait until it serves.
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
	// It must not outlive the measurement, however that ends.
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

// awaitDERP returns after the first DERP handshake that succeeds. It tries again
// at once, for it is the clock of the start as well.
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

// awaitSTUN returns after the first STUN answer, to whichever request it is.
func (s *server) awaitSTUN(ctx context.Context) error {
	conn, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(s.stun))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	request, answer := stun.Request(stun.NewTxID()), make([]byte, maxAnswer)
	return s.await(ctx, "a STUN answer", func(context.Context) error {
		if _, err := conn.Write(request); err != nil {
			return err // that nobody listens yet
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
			return fmt.Errorf("waiting for %s of %s: it has ended", what, s.name)
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s of %s: %w", what, s.name, err)
		default:
			pause(retryAfter)
		}
	}
}

// stop ends the process and waits until it is gone.
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

// lastWords is the end of the server's log, for an error message.
func (s *server) lastWords() string {
	b, err := os.ReadFile(s.log)
	if err != nil || len(b) == 0 {
		return ""
	}
	return fmt.Sprintf("\nthe end of the log of %s:\n%s", s.name, bytes.TrimSpace(b[max(0, len(b)-logTail):]))
}

// freePorts finds ports that nobody has. They are below those that systems give
// to whoever asks for any, or the load would take them in between.
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

// startOn starts a command that may run on these CPUs only, and says when it has
// ended. A child inherits them from the thread that makes it, and is killed when
// that ends: so it is a thread of its own, for as long as the command lives.
func startOn(cpus []int, command *exec.Cmd) (ended <-chan struct{}, err error) {
	gone := make(chan struct{})
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends here
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

// makeCertificate writes the certificate of both servers, with a P-256 key, to
// where either looks for it.
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

// share is how many CPUs the server has, and the load too; both have all of them
// if they are not pinned.
func (p *program) share() float64 {
	if len(p.cpus) > 0 {
		return float64(len(p.cpus))
	}
	return float64(runtime.NumCPU())
}
