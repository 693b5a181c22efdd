//go:build linux

// Command torture attacks derpd, and derper beside it, on loopback. For each attack it
// prints what derpd promises, what was measured, and the same value of derper. It
// needs root. Each attack runs in a network namespace of its own.
//
// `make torture` builds both servers.
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
	"strings"
	"syscall"
	"time"
)

const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

const usage = `usage: torture [flags]

  --derper FILE   upstream's server; without it, only derpd is attacked
  --derpd FILE    the derpd to attack
  --soak TIME     how long the soak lasts, 3m by default and 20s with --short
  --short         only the short attacks, as CI runs them
  --only REGEXP   only attacks whose name matches
  --list          list the attacks
`

// First arguments of the processes that this program starts of itself.
const (
	modeRow    = "row"    // attacks one server, in a namespace of its own
	modeAttack = "attack" // is the attacker
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(exitCode(run(ctx, os.Args[1:], os.Stdout, os.Stderr), os.Stderr))
}

// usageError is an error in the command line.
type usageError struct{ error }

func exitCode(err error, stderr io.Writer) int {
	if err == nil {
		return exitOK
	}
	_, _ = fmt.Fprintf(stderr, "torture: %s\n", strings.TrimRight(err.Error(), "\n"))
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	return exitFailed
}

// options are the command line.
type options struct {
	derper, derpd string
	short, list   bool
	soak          time.Duration
	only          *regexp.Regexp
}

func parse(args []string) (options, error) {
	var o options
	var only string
	flags := flag.NewFlagSet("torture", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.derper, "derper", "", "")
	flags.StringVar(&o.derpd, "derpd", "", "")
	flags.BoolVar(&o.short, "short", false, "")
	flags.DurationVar(&o.soak, "soak", 0, "")
	flags.BoolVar(&o.list, "list", false, "")
	flags.StringVar(&only, "only", "", "")
	err := flags.Parse(args)
	if err == nil {
		o.only, err = regexp.Compile(only)
	}
	switch {
	case err != nil:
	case flags.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case o.soak < 0:
		err = fmt.Errorf("--soak: not a time (got %v); use a time such as 1h", o.soak)
	case o.derpd == "" && !o.list:
		err = errors.New("--derpd is not set; use make torture, which sets it")
	}
	if o.soak == 0 {
		o.soak = usualSoak
		if o.short {
			o.soak = shortSoak
		}
	}
	return o, err
}

// run executes one command line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) > 2 && args[0] == underClock {
		return execUnderClock(ctx, args[1:])
	}
	if len(args) == 2 {
		switch args[0] {
		case modeRow:
			return runRow(ctx, args[1], stdout, stderr)
		case modeAttack:
			return runAttack(ctx, args[1], stdout)
		}
	}
	o, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		_, err = io.WriteString(stdout, usage)
		return err
	} else if err != nil {
		return usageError{fmt.Errorf("%w\n\n%s", err, usage)}
	}
	chosen := selection(o)
	switch {
	case len(chosen) == 0:
		return usageError{fmt.Errorf("--only: no attack matches (got %s)", o.only)}
	case o.list:
		return list(stdout, chosen)
	case os.Geteuid() != 0:
		return errors.New("network namespaces and limits need root; run as root")
	}
	// Every row runs in a directory of its own.
	for _, path := range []*string{&o.derpd, &o.derper} {
		if *path == "" {
			continue
		}
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
		if _, err := os.Stat(*path); err != nil {
			return err
		}
	}
	results, err := attackAll(ctx, o, chosen, stdout, stderr)
	if err != nil {
		return err
	}
	return conclude(stdout, results)
}
