package main

import (
	"flag"
	"fmt"
	"io"
	"strings"

	"derpd/relay/derpmap"
)

func newFlags(command string, stderr io.Writer) *flag.FlagSet {
	flags := flag.NewFlagSet(command, flag.ContinueOnError)
	flags.SetOutput(stderr)
	return flags
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

func formatFlag(flags *flag.FlagSet) *mapFormat {
	format := mapFormat("policy")
	flags.Var(&format, "format", "one of "+strings.Join(derpmap.Formats, ", "))
	return &format
}

// parseFlags takes flags and nothing else.
func parseFlags(flags *flag.FlagSet, args []string) error {
	if err := flags.Parse(args); err != nil {
		return noStart{errQuiet}
	}
	if flags.NArg() > 0 {
		return noStart{fmt.Errorf("%s: unexpected argument %q", flags.Name(), flags.Arg(0))}
	}
	return nil
}
