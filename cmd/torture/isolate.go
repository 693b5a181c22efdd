//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"derpd/internal/testrelay"
)

// job is what the process of a row gets to know.
type job struct {
	Row    string        `json:"row"`
	Server string        `json:"server"` // derpd or derper
	Derpd  string        `json:"derpd"`
	Derper string        `json:"derper"`
	Short  bool          `json:"short"`
	Soak   time.Duration `json:"soak"` // how long the soak lasts
	Dir    string        `json:"dir"`  // empty directory, which the caller removes
}

// lightAtOnce is the number of light rows that run at the same time.
const lightAtOnce = 6

// attackAll runs the light rows beside each other, and then the others in turn. It prints
// each row when it has ended.
func attackAll(ctx context.Context, o options, rows []row, stdout, progress io.Writer) ([]result, error) {
	results := make([]result, len(rows))
	var printing sync.Mutex
	attack := func(ctx context.Context, i int) error {
		done, err := attackBoth(ctx, o, rows[i], progress)
		if err != nil {
			return err
		}
		results[i] = done
		printing.Lock()
		defer printing.Unlock()
		return done.write(stdout)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(lightAtOnce)
	for i, r := range rows {
		if r.light {
			g.Go(func() error { return attack(gctx, i) })
		}
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for i, r := range rows {
		if !r.light {
			if err := attack(ctx, i); err != nil {
				return nil, err
			}
		}
	}
	return results, nil
}

// attackBoth runs a row on derpd, and then on derper if the row and the options say so.
func attackBoth(ctx context.Context, o options, r row, progress io.Writer) (result, error) {
	begun := time.Now()
	done := result{row: r}
	j := job{Row: r.name, Server: testrelay.Derpd, Derpd: o.derpd, Derper: o.derper, Short: o.short, Soak: o.soak}
	var err error
	if done.derpd, err = attackOne(ctx, j, r, progress); err != nil {
		return result{}, err
	}
	if o.short && r.timed && done.verdict() == broken {
		if err := done.write(progress); err != nil {
			return result{}, err
		}
		_, _ = fmt.Fprintf(progress, "%s: once more\n", r.name)
		if done.derpd, err = attackOne(ctx, j, r, progress); err != nil {
			return result{}, err
		}
	}
	if j.Server = testrelay.Derper; r.upstream && o.derper != "" {
		if done.derper, err = attackOne(ctx, j, r, progress); err != nil {
			return result{}, err
		}
	}
	done.took = time.Since(begun)
	return done, nil
}

// attackOne runs a row on one server in a process with a network namespace and mounts of
// its own.
func attackOne(ctx context.Context, j job, r row, progress io.Writer) (outcome, error) {
	dir, err := os.MkdirTemp("", "derpd-torture")
	if err != nil {
		return outcome{}, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	j.Dir = dir
	limit := r.limit
	if limit == 0 {
		limit = usualLimit
	}
	limit += j.Soak // of which only one row makes use
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	command, err := itself(limited, nil, modeRow, j)
	if err != nil {
		return outcome{}, err
	}
	var out bytes.Buffer
	command.Stdout, command.Stderr = &out, progress
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS}
	command.Cancel = func() error { return command.Process.Signal(syscall.SIGTERM) }
	command.WaitDelay = 10 * time.Second
	ended, err := testrelay.StartOn(nil, command)
	if errors.Is(err, unix.EPERM) {
		return outcome{NotRun: "this machine allows no namespaces"}, nil
	} else if err != nil {
		return outcome{}, err
	}
	<-ended
	if ctx.Err() != nil {
		return outcome{}, ctx.Err()
	}
	var got outcome
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		got.Error = fmt.Sprintf("the attack on %s ended without a result: %s", j.Server, command.ProcessState)
	}
	if limited.Err() != nil {
		got.Error = fmt.Sprintf("the attack on %s did not end within %v; %s", j.Server, limit, got.Error)
	}
	return got, nil
}

// itself is a command that runs this program in one of its modes, with arguments that
// come before the program's path.
func itself(ctx context.Context, before []string, mode string, argument any) (*exec.Cmd, error) {
	path, err := os.Executable()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(argument)
	if err != nil {
		return nil, err
	}
	all := slices.Concat(before, []string{path, mode, string(text)})
	return exec.CommandContext(ctx, all[0], all[1:]...), nil
}

// runRow is the process of a row.
func runRow(ctx context.Context, argument string, stdout, progress io.Writer) error {
	var j job
	if err := json.Unmarshal([]byte(argument), &j); err != nil {
		return err
	}
	at := slices.IndexFunc(registered, func(r row) bool { return r.name == j.Row })
	if at < 0 {
		return fmt.Errorf("no row has the name %q", j.Row)
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return os.NewSyscallError("keeping mounts private", err)
	}
	l, err := newLab(j, progress)
	if err != nil {
		return err
	}
	if l.own, err = l.measureMachine(ctx); err != nil {
		return err
	}
	lines, err := registered[at].run(ctx, l)
	l.close()
	return json.NewEncoder(stdout).Encode(outcomeOf(lines, err))
}

// loopbackUp starts the loopback device of a new namespace, which then has all
// addresses of 127.0.0.0/8.
func loopbackUp() error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(socket) }()
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING | unix.IFF_LOOPBACK)
	return os.NewSyscallError("starting the device lo", unix.IoctlIfreq(socket, unix.SIOCSIFFLAGS, request))
}
