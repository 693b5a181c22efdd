package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"derpd/relay/derpmap"
)

// verb is one command of derpd.
type verb struct {
	name string
	args string // arguments, as the usage line shows them
	help string // one line
	run  func(context.Context, *call) error
}

// verbs lists the commands in the order of `derpd help`. The first is the
// default. A new command is one line here and one file with its function.
func verbs() []verb {
	return []verb{
		{"serve", "", "run the relay", serve},
		{"derpmap", "[--format FORMAT]", "print the DERP map to paste into a tailnet's policy or Headscale", printMap},
		{"pin", "[--rotate | --accept] [--format FORMAT] [HASH]", "print the hash of the self-signed certificate; replace it, or accept the one that waits in the files", pin},
		{"admit", "NODEKEY", "print whether the running relay admits the node with this key (nodekey:…), and the answer of each source", printAdmission},
		{"env", "[--example]", "print the configuration in force, without secrets", printEnvironment},
		{"healthcheck", "", "print the health of the running relay; exit code 1 unless it is ready", healthcheck},
		{"version", "[--check]", "print the version, or whether a newer release is out", printVersion},
		{"help", "[COMMAND]", "print this help, or the help of a command", help},
	}
}

// call is one execution of a verb.
type call struct {
	verb   verb
	start  time.Time // of the process
	args   []string  // after the verb
	env    []string  // NAME=value
	stdout io.Writer
	stderr io.Writer
	flags  *flag.FlagSet
}

// errHelp reports that the help was asked for and printed.
var errHelp = errors.New("help printed")

// run executes one command line. It reads the environment only from env.
func run(ctx context.Context, start time.Time, args, env []string, stdout, stderr io.Writer) error {
	name := verbs()[0].name
	if len(args) > 0 {
		name, args = args[0], args[1:]
	}
	switch name {
	case "-h", "--help":
		name, args = "help", nil
	case "--version":
		name, args = "version", nil
	}
	v, err := findVerb(name)
	if err != nil {
		return err
	}
	err = v.run(ctx, &call{v, start, args, env, stdout, stderr, newFlags(v.name)})
	if errors.Is(err, errHelp) {
		return nil
	}
	return err
}

// newFlags returns a flag set that prints nothing: parse returns its errors.
func newFlags(verb string) *flag.FlagSet {
	flags := flag.NewFlagSet(verb, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	return flags
}

func findVerb(name string) (verb, error) {
	for _, v := range verbs() {
		if v.name == name {
			return v, nil
		}
	}
	return verb{}, usageError{fmt.Errorf("unknown command %q\n\n%s", name, usage())}
}

// parse parses the flags and exactly as many arguments as given. It prints the
// help of the verb if that is asked for.
func (c *call) parse(arguments int) error { return c.parseSome(arguments, arguments) }

// parseSome is parse for a number of arguments in a range.
func (c *call) parseSome(least, most int) error {
	err := c.flags.Parse(c.args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		if _, err := io.WriteString(c.stdout, c.usage()); err != nil {
			return err
		}
		return errHelp
	case err != nil:
		return usageError{fmt.Errorf("%s: %w; see `derpd %s --help`", c.verb.name, err, c.verb.name)}
	case c.flags.NArg() > most:
		return usageError{fmt.Errorf("%s: unexpected argument %q; see `derpd %s --help`", c.verb.name, c.flags.Arg(most), c.verb.name)}
	case c.flags.NArg() < least:
		return usageError{fmt.Errorf("%s: want %s; see `derpd %s --help`", c.verb.name, c.verb.args, c.verb.name)}
	}
	return nil
}

// usage is the help of the verb.
func (c *call) usage() string {
	var b strings.Builder
	fmt.Fprintf(&b, "usage: %s\n\n%s\n", strings.TrimSpace("derpd "+c.verb.name+" "+c.verb.args), c.verb.help)
	if c.verb.name == "help" {
		return b.String() + "\n" + usage()
	}
	first := true
	c.flags.VisitAll(func(f *flag.Flag) {
		if first {
			b.WriteString("\nflags:\n")
			first = false
		}
		value, text := flag.UnquoteUsage(f)
		fmt.Fprintf(&b, "  --%s\n        %s\n", strings.TrimSpace(f.Name+" "+value), text)
	})
	return b.String()
}

// usage is the help of derpd.
func usage() string {
	var b strings.Builder
	b.WriteString("usage: derpd [COMMAND]\n\n")
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for i, v := range verbs() {
		text := v.help
		if i == 0 {
			text += "; the default"
		}
		_, _ = fmt.Fprintf(table, "  %s\t%s\n", strings.TrimSpace(v.name+" "+v.args), text)
	}
	_ = table.Flush() // into memory
	b.WriteString("\nderpd COMMAND --help prints the flags of a command.\nConfiguration is by environment variables: `derpd env` lists them.\n")
	return b.String()
}

// help is the command `derpd help`.
func help(_ context.Context, c *call) error {
	if len(c.args) == 0 {
		_, err := io.WriteString(c.stdout, usage())
		return err
	}
	if err := c.parse(1); err != nil {
		return err
	}
	v, err := findVerb(c.flags.Arg(0))
	if err != nil {
		return err
	}
	// The flags are known only to the verb itself.
	return v.run(context.Background(), &call{v, c.start, []string{"--help"}, c.env, c.stdout, c.stderr, newFlags(v.name)})
}

// mapFormat is a flag whose value is one of derpmap.Formats.
type mapFormat string

// String implements [flag.Value].
func (f *mapFormat) String() string { return string(*f) }

// Set implements [flag.Value].
func (f *mapFormat) Set(value string) error {
	*f = mapFormat(value)
	_, err := derpmap.Format(value, derpmap.New(derpmap.Node{}), nil)
	return err
}

// formatFlag adds the flag --format.
func (c *call) formatFlag() *mapFormat {
	format := mapFormat("policy")
	c.flags.Var(&format, "format", "print the map as `FORMAT`: "+strings.Join(derpmap.Formats, ", ")+" (default policy)")
	return &format
}
