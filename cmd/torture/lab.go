//go:build linux

package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"derpd/internal/testrelay"
)

// lab is what a row has: one of the two servers, and everything that may be started
// around it. It lives in a process and a network namespace of its own, which ends with
// the row.
type lab struct {
	job
	certificate *x509.Certificate
	progress    io.Writer
	begun       time.Time
	closers     []func()
	own         *machine // during the whole row
}

func newLab(j job, progress io.Writer) (*lab, error) {
	certificate, err := testrelay.MakeCertificate(j.Dir)
	if err != nil {
		return nil, err
	}
	return &lab{job: j, certificate: certificate, progress: progress, begun: time.Now()}, nil
}

// onClose runs f at the end of the row. The last f is the first to run.
func (l *lab) onClose(f func()) { l.closers = append(l.closers, f) }

func (l *lab) close() {
	for _, f := range slices.Backward(l.closers) {
		f()
	}
	l.closers = nil
}

// say prints what the row does now.
func (l *lab) say(format string, args ...any) {
	_, _ = fmt.Fprintf(l.progress, "%s %-7s %5.1f s  %s\n", l.Row, l.Server, time.Since(l.begun).Seconds(), fmt.Sprintf(format, args...))
}

// isDerpd reports whether the row attacks derpd.
func (l *lab) isDerpd() bool { return l.Server == testrelay.Derpd }

// pick returns the size of an attack, which is smaller with --short.
func pick[T any](l *lab, whole, short T) T {
	if l.Short {
		return short
	}
	return whole
}

// setup is the configuration of a server.
type setup struct {
	env    []string // of derpd
	args   []string // of derper
	files  int      // limit of open files; 0 is this process's
	memory int64    // limit in bytes, by a cgroup; 0 is none

	// source admits clients; nil admits all.
	source *source
}

// relay is a running server.
type relay struct {
	*testrelay.Server
	group *memoryGroup // nil without a limit of memory
}

// start starts the server. It ends with the row, or before with stop.
func (l *lab) start(ctx context.Context, s setup) (*relay, error) {
	p := &testrelay.Program{
		Name: testrelay.Derpd, Path: l.Derpd, Describe: testrelay.DerpdCommand,
		Env: s.env, Dir: l.Dir, Certificate: l.certificate,
	}
	if s.source != nil {
		p.Env = append([]string{"DERP_VERIFY_CLIENT_URL=" + s.source.url}, p.Env...)
	}
	if !l.isDerpd() {
		p.Name, p.Path, p.Describe, p.Env = testrelay.Derper, l.Derper, testrelay.DerperCommand, nil
		p.Args = s.args
		if s.source != nil {
			p.Args = append([]string{"-verify-client-url", s.source.url, "-verify-client-url-fail-open=false"}, p.Args...)
		}
	}
	r := &relay{}
	var before []string
	if s.memory > 0 {
		var err error
		if r.group, err = newMemoryGroup(groupRoot, s.memory); err != nil {
			return nil, err
		}
		l.onClose(r.group.remove)
		before = append(before, r.group.join())
	}
	if s.files > 0 {
		before = append(before, fmt.Sprintf("ulimit -n %d", s.files))
	}
	p.Before = strings.Join(before, " && ")

	if s.source != nil {
		// The client that waits for the start has a new key.
		s.source.setOpen(true)
		defer s.source.setOpen(false)
	}
	var err error
	if r.Server, err = p.Start(ctx); err != nil {
		return nil, err
	}
	l.onClose(r.Stop)
	return r, nil
}

// died returns an error if the server's process has ended.
func (r *relay) died() error {
	select {
	case <-r.Ended:
	default:
		return nil
	}
	if r.group != nil {
		if kills, err := r.group.kills(); err == nil && kills > 0 {
			return fmt.Errorf("%s was killed for lack of memory", r.Name)
		}
	}
	return fmt.Errorf("%s ended under the attack%s", r.Name, r.LastWords())
}
