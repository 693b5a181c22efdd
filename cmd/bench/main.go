//go:build linux

// Command bench measures derpd beside derper, upstream's own server, with the
// same clients, the same certificate and in turns: speeds of a machine that
// others use too go up and down, and only ratios of what was measured one after
// the other mean anything. It runs in the current directory, which is derpd's.
//
// Both servers and all of the load are on loopback. `make bench` builds what it
// needs.
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
)

const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

const usage = `usage: bench [flags]

  --derper FILE   upstream's server
  --derpd FILE    the derpd to measure
  --derpd-env X=Y a variable for derpd, to measure a setting; may be repeated
  --quick         three minutes: what the targets need, in short measurements
  --full          half an hour: every size, burst and number of pairs
  --path          instead, what arrives at a client behind a long path with
                  losses; in a network namespace of its own: unshare --net
  --only REGEXP   only measurements whose name matches
  --rounds N      how often both are measured, 5 at least for ratios to believe
  --window N      packets under way from one sender, when it sends all it can
  --pin=false     let servers and load share all CPUs, instead of half for each

  --json FILE     write every value that was measured
  --from FILE     measure nothing, report what --json has written
  --svg FILE      write the picture
  --docs          write docker/bench.svg, and its part of the READMEs
  --check         exit with 1 when a target is not reached
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(exitCode(run(ctx, os.Args[1:], os.Stdout, os.Stderr), os.Stderr))
}

// usageError is a command line that means nothing.
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
	derper, derpd   string
	derpdEnv        []string
	quick, full     bool
	path            bool
	only            *regexp.Regexp
	rounds, window  int
	pin             bool
	json, from, svg string
	docs, check     bool
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
			return errors.New("not NAME=VALUE")
		}
		o.derpdEnv = append(o.derpdEnv, s)
		return nil
	})
	flags.BoolVar(&o.quick, "quick", false, "")
	flags.BoolVar(&o.full, "full", false, "")
	flags.BoolVar(&o.path, "path", false, "")
	flags.StringVar(&only, "only", "", "")
	flags.IntVar(&o.rounds, "rounds", 5, "")
	flags.IntVar(&o.window, "window", queueDepth, "")
	flags.BoolVar(&o.pin, "pin", true, "")
	flags.StringVar(&o.json, "json", "", "")
	flags.StringVar(&o.from, "from", "", "")
	flags.StringVar(&o.svg, "svg", "", "")
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
		err = errors.New("--quick and --full exclude each other")
	case o.rounds < 1:
		err = fmt.Errorf("--rounds %d: at least one is needed", o.rounds)
	case o.window < largestBurst:
		err = fmt.Errorf("--window %d: a burst of %d must fit", o.window, largestBurst)
	case o.from == "" && (o.derper == "" || o.derpd == ""):
		err = errors.New("--derper and --derpd are needed; make bench builds and names them")
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
	if o.svg != "" {
		if err := os.WriteFile(o.svg, r.picture(), 0o644); err != nil {
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

// measure runs all measurements, every round on servers started anew.
func measure(ctx context.Context, o options, progress io.Writer) (*report, error) {
	list := selection(o)
	if len(list) == 0 {
		return nil, usageError{fmt.Errorf("--only %s: no measurement has such a name", o.only)}
	}
	if o.path {
		if err := ownNetwork(ctx); err != nil {
			return nil, err
		}
	}
	serverCPUs, err := share(o.pin)
	if err != nil {
		return nil, err
	}
	// The load's own garbage is not what is measured, and there is memory.
	debug.SetGCPercent(400)

	dir, err := os.MkdirTemp("", "derpd-bench")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	certificate, err := makeCertificate(dir)
	if err != nil {
		return nil, err
	}
	programs := make([]*program, 2)
	for i, p := range []program{
		{name: derper, path: o.derper, describe: derperCommand},
		{name: derpd, path: o.derpd, describe: derpdCommand, env: o.derpdEnv},
	} {
		if p.path, err = filepath.Abs(p.path); err != nil { // it runs in dir
			return nil, err
		}
		p.dir, p.cpus, p.certificate = dir, serverCPUs, certificate
		programs[i] = &p
	}

	r := &report{
		Date: time.Now().UTC().Truncate(time.Second), Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
		Rounds: o.rounds, ServerCPUs: len(serverCPUs), Pinned: len(serverCPUs) > 0,
	}
	if o.path {
		r.Congestion = systemCongestion()
	}
	for round := range o.rounds {
		if err := measureRound(ctx, list, programs, round, r, progress); err != nil {
			return nil, err
		}
	}
	r.conclude()
	return r, nil
}

// measureRound measures everything once with both programs. Who goes first
// changes from round to round.
func measureRound(ctx context.Context, list []measurement, programs []*program, round int, r *report, progress io.Writer) error {
	servers := make([]*server, len(programs))
	for i, p := range programs {
		s, err := p.start(ctx)
		if err != nil {
			return err
		}
		defer s.stop()
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
				return fmt.Errorf("%s, %s: %w%s", m.name, programs[i].name, err, servers[i].lastWords())
			}
			samples[i] = append(samples[i], sample)
		}
		for i, p := range programs {
			r.add(m.name, p.name, mean(samples[i]))
		}
	}
	return nil
}

// order is which of the two programs is measured when. What is measured again is
// so in the order 0 1 1 0: a machine that becomes faster or slower all the while
// is the same for both.
func order(round int, again bool) []int {
	first, second := round%2, 1-round%2
	if again {
		return []int{first, second, second, first}
	}
	return []int{first, second}
}
