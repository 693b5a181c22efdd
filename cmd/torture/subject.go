//go:build linux

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"tailscale.com/types/key"

	"derpd/internal/testkit/acmetest"
	"derpd/internal/testrelay"
)

// subject is a derpd that is started again and again with the same data directory, and
// keeps its identity there.
type subject struct {
	lab     *lab
	data    string // directory
	program testrelay.Program
}

// life is one process of a subject.
type life struct{ *testrelay.Server }

// subject describes a derpd with a pinned certificate, unless env says otherwise.
func (l *lab) subject(name string, env ...string) (*subject, error) {
	s := &subject{lab: l, data: filepath.Join(l.Dir, name)}
	s.program = testrelay.Program{
		Name: testrelay.Derpd, Path: l.Derpd, Describe: testrelay.DerpdCommand, Dir: l.Dir,
		Env: append([]string{
			"DERP_DATA_DIR=" + s.data, "DERP_CERT_DIR=" + filepath.Join(s.data, "certs"),
			"DERP_CERT_MODE=pinned", "DERP_DOMAIN=" + testrelay.Hostname,
		}, env...),
	}
	return s, os.MkdirAll(s.data, 0o700)
}

// authority starts an authority whose certificates have a validity; 0 is its default. It
// finds a relay at httpPort of 127.0.0.1. env makes a relay use it.
func (l *lab) authority(validity time.Duration, httpPort int) (a *acmetest.CA, env []string, err error) {
	const dns = "127.0.0.1:5353"
	if err := errors.Join(os.Setenv("PEBBLE_VA_NOSLEEP", "1"), os.Setenv("PEBBLE_WFE_NONCEREJECT", "0")); err != nil {
		return nil, nil, err
	}
	stop, err := acmetest.DNS(dns)
	if err != nil {
		return nil, nil, err
	}
	l.onClose(stop)
	if a, err = acmetest.New(l.Dir, dns); err != nil {
		return nil, nil, err
	}
	l.onClose(a.Stop)
	a.Validity = validity
	return a, []string{
		"DERP_CERT_MODE=letsencrypt", "DERP_DOMAIN=" + testrelay.Hostname, fmt.Sprintf("DERP_HTTP_PORT=%d", httpPort), "DERP_ACME_CHALLENGES=http",
		"DERP_ACME_CA=" + a.Directory, "DERP_ACME_CA_ROOTS=" + a.RootsFile,
	}, nil
}

// launch starts a process, and does not wait. It ends with the row.
func (s *subject) launch(ctx context.Context) (life, error) {
	server, err := s.program.Launch(ctx)
	if err != nil {
		return life{}, err
	}
	s.lab.onClose(server.Stop)
	return life{server}, nil
}

// start starts a process, and waits until it is ready.
func (s *subject) start(ctx context.Context) (life, time.Duration, error) {
	begun := time.Now()
	r, err := s.launch(ctx)
	if err != nil {
		return r, 0, err
	}
	err = r.until(ctx, "ready", func(status int, _ string) bool { return status == http.StatusOK })
	return r, time.Since(begun), err
}

const (
	subjectWithin = 30 * time.Second
	subjectEvery  = 20 * time.Millisecond
)

// until asks /readyz until holds, for [subjectWithin].
func (r life) until(ctx context.Context, what string, holds func(status int, text string) bool) error {
	ctx, cancel := context.WithTimeout(ctx, subjectWithin)
	defer cancel()
	for {
		status, text, _ := health(ctx, r.Admin, "/readyz")
		if holds(status, text) {
			return nil
		}
		select {
		case <-r.Ended:
			return fmt.Errorf("waiting for %q: the process has ended%s", what, r.LastWords())
		default:
		}
		if testrelay.Wait(ctx, subjectEvery) != nil {
			return fmt.Errorf("not within %v: %s; /readyz says %d %s%s", subjectWithin, what, status, text, r.LastWords())
		}
	}
}

// kill kills the process.
func (r life) kill() {
	_ = unix.Kill(r.PID, unix.SIGKILL)
	<-r.Ended
	_ = os.Remove(r.Log)
}

// shown is what a client sees of a relay: its certificate, and the name of its meta
// certificate, which is its node key.
type shown struct {
	leaf *x509.Certificate
	key  string
}

func (r life) shown(ctx context.Context) (shown, error) {
	tcp, err := testrelay.DialTCP(ctx, r.HTTPS, netip.Addr{})
	if err != nil {
		return shown{}, err
	}
	defer func() { _ = tcp.Close() }()
	conn := tls.Client(tcp, &tls.Config{ServerName: testrelay.Hostname, InsecureSkipVerify: true}) // the row compares it
	if err := conn.HandshakeContext(ctx); err != nil {
		return shown{}, err
	}
	chain := conn.ConnectionState().PeerCertificates
	return shown{chain[0], chain[len(chain)-1].Subject.CommonName}, nil
}

// admits connects a node, and returns why it is refused.
func (r life) admits(ctx context.Context, node key.NodePrivate) error {
	seen, err := r.shown(ctx)
	if err != nil {
		return err
	}
	c, err := testrelay.Dial(ctx, testrelay.Target{HTTPS: r.HTTPS, Certificate: seen.leaf}, node, netip.Addr{})
	if err == nil {
		c.Close()
	}
	return err
}

// admitsSoon is admits for a node that tries again, for a time.
func (r life) admitsSoon(ctx context.Context, node key.NodePrivate, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		err := r.admits(ctx, node)
		if err == nil || testrelay.Wait(ctx, tryAgain) != nil {
			return err
		}
	}
}

// logged reports whether the log has a text.
func (r life) logged(text string) bool {
	log, err := os.ReadFile(r.Log)
	return err == nil && strings.Contains(string(log), text)
}
