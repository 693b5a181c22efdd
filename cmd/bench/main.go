//go:build linux

// Command bench compares derpd with derper, upstream's own server. It measures both
// in turns, with the same clients and certificate. The speed of a shared machine
// varies, so only ratios of consecutive measurements are meaningful. Command bench
// runs in the root of derpd's repository.
//
// The servers and the load use loopback only. `make bench` builds both servers.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"derpd/internal/testrelay"
)

const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

const usage = `usage: bench [flags]

  --derper FILE   upstream's server
  --derpd FILE    the derpd to measure
  --derpd-env X=Y set a variable of derpd, to measure a setting; may be repeated
  --quick         three minutes: few and short measurements
  --full          half an hour: every size, burst and number of pairs
  --path          measure only paths with slow, long, lossy or shared links; needs a
                  network namespace: unshare --net
  --only REGEXP   only measurements whose name matches
  --rounds N      number of rounds; ratios are reliable from 5 on

  --json FILE     write all measured values
  --from FILE     measure nothing, and report the values of such a file
  --docs          write docker/bench.svg and the tables in the READMEs
  --check         exit with 1 when a target is not reached
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(exitCode(run(ctx, os.Args[1:], os.Stdout, os.Stderr), os.Stderr))
}

// The two servers, as processes.
type (
	program = testrelay.Program
	server  = testrelay.Server
)

// usageError is an error in the command line.
type usageError struct{ error }

func exitCode(err error, stderr io.Writer) int {
	if err == nil {
		return exitOK
	}
	_, _ = fmt.Fprintf(stderr, "bench: %s\n", strings.TrimRight(err.Error(), "\n"))
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	return exitFailed
}

// options are the command line.
type options struct {
	derper, derpd string
	derpdEnv      []string
	quick, full   bool
	path          bool
	only          *regexp.Regexp
	rounds        int
	json, from    string
	docs, check   bool
}

func parse(args []string) (options, error) {
	var o options
	var only string
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.derper, "derper", "", "")
	flags.StringVar(&o.derpd, "derpd", "", "")
	flags.Func("derpd-env", "", func(s string) error {
		if !strings.Contains(s, "=") {
			return errors.New("not a variable; use NAME=VALUE")
		}
		o.derpdEnv = append(o.derpdEnv, s)
		return nil
	})
	flags.BoolVar(&o.quick, "quick", false, "")
	flags.BoolVar(&o.full, "full", false, "")
	flags.BoolVar(&o.path, "path", false, "")
	flags.StringVar(&only, "only", "", "")
	flags.IntVar(&o.rounds, "rounds", 5, "")
	flags.StringVar(&o.json, "json", "", "")
	flags.StringVar(&o.from, "from", "", "")
	flags.BoolVar(&o.docs, "docs", false, "")
	flags.BoolVar(&o.check, "check", false, "")
	err := flags.Parse(args)
	if err == nil {
		o.only, err = regexp.Compile(only)
	}
	switch {
	case err != nil:
	case flags.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case o.quick && o.full:
		err = errors.New("--quick and --full are both set; use one of them")
	case o.rounds < 1:
		err = fmt.Errorf("--rounds: too few (got %d); use 1 or more", o.rounds)
	case o.from == "" && (o.derper == "" || o.derpd == ""):
		err = errors.New("--derper and --derpd are not both set; use make bench, which sets them")
	}
	return o, err
}

// run executes one command line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		_, err = io.WriteString(stdout, usage)
		return err
	} else if err != nil {
		return usageError{fmt.Errorf("%w\n\n%s", err, usage)}
	}

	var r *report
	if o.from != "" {
		r, err = readReport(o.from)
	} else {
		r, err = measure(ctx, o, stderr)
	}
	if err != nil {
		return err
	}
	if err := r.writeTable(stdout); err != nil {
		return err
	}
	if o.json != "" {
		if err := r.writeJSON(o.json); err != nil {
			return err
		}
	}
	if o.docs {
		if err := r.writeDocs("."); err != nil {
			return err
		}
	}
	if missed := r.missed(); o.check && missed > 0 {
		return fmt.Errorf("%d targets are not reached", missed)
	}
	return nil
}

// measure runs all measurements, and starts both servers again for every round.
func measure(ctx context.Context, o options, progress io.Writer) (*report, error) {
	list := selection(o)
	if len(list) == 0 {
		return nil, usageError{fmt.Errorf("--only: no measurement matches (got %s)", o.only)}
	}
	if o.path {
		if err := ownNetwork(ctx); err != nil {
			return nil, err
		}
	}
	serverCPUs, err := share()
	if err != nil {
		return nil, err
	}
	// Fewer garbage collections leave more CPU time for the load.
	debug.SetGCPercent(400)

	dir, err := os.MkdirTemp("", "derpd-bench")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	certificate, err := testrelay.MakeCertificate(dir)
	if err != nil {
		return nil, err
	}
	programs := make([]*program, 2)
	for i, p := range []program{
		{Name: testrelay.Derper, Path: o.derper, Describe: testrelay.DerperCommand},
		{Name: testrelay.Derpd, Path: o.derpd, Describe: testrelay.DerpdCommand, Env: o.derpdEnv},
	} {
		if p.Path, err = filepath.Abs(p.Path); err != nil { // the program's working directory is dir
			return nil, err
		}
		p.Dir, p.CPUs, p.Certificate = dir, serverCPUs, certificate
		programs[i] = &p
	}

	r := &report{
		Date: time.Now().UTC().Truncate(time.Second), Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
		Rounds: o.rounds, ServerCPUs: len(serverCPUs), Pinned: len(serverCPUs) > 0,
	}
	if o.path {
		r.Congestion = strings.Join(allowedCongestion(), " and ")
	}
	for round := range o.rounds {
		if err := measureRound(ctx, list, programs, round, r, progress); err != nil {
			return nil, err
		}
	}
	r.conclude()
	return r, nil
}

// measureRound measures everything once with both programs.
func measureRound(ctx context.Context, list []measurement, programs []*program, round int, r *report, progress io.Writer) error {
	servers := make([]*server, len(programs))
	for i, p := range programs {
		s, err := p.Start(ctx)
		if err != nil {
			return err
		}
		defer s.Stop()
		servers[i] = s
	}
	for _, m := range list {
		_, _ = fmt.Fprintf(progress, "%s  round %d of %d  %s\n", time.Now().Format(time.TimeOnly), round+1, r.Rounds, m.name)
		samples := make([][]sample, len(programs))
		for _, i := range order(round, m.again) {
			sample, err := m.run(ctx, servers[i])
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				return fmt.Errorf("%s, %s: %w%s", m.name, programs[i].Name, err, servers[i].LastWords())
			}
			samples[i] = append(samples[i], sample)
		}
		for i, p := range programs {
			r.add(m.name, p.Name, mean(samples[i]))
		}
	}
	return nil
}

// order returns the order of the two programs in a round. The first program
// alternates from round to round. With again, the order is 0 1 1 0: then a machine
// that steadily becomes slower affects both programs alike.
func order(round int, again bool) []int {
	first, second := round%2, 1-round%2
	if again {
		return []int{first, second, second, first}
	}
	return []int{first, second}
}
