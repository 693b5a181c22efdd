// Command upstream keeps derpd current. It finds the newest stable release of
// Tailscale and of certmagic, known vulnerabilities that have a fix, and a newer
// base image; with --write it takes what it found into go.mod, go.sum, the
// Dockerfile, the READMEs and the changelog. Its other verbs are what the
// release workflow needs to know.
//
// It works in the current directory, which is derpd's. Modules come from where
// the go command takes them, GOPROXY. When GITHUB_OUTPUT names a file, what a
// workflow must know is appended to it too.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// Exit codes. That there is something new is no code of its own: `go run` makes
// 1 of every other one. It is said by what is printed, and by updated=true.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

const usage = `usage: upstream [flags] [command]

  (none)           say what is newer than what derpd is built on
                   --write takes it
  release [LINE]   close the changelog's next section, with LINE added to it, and
                   print the version of that release
  notes VERSION    print the changelog's section of a release
  tags VERSION IMAGE...
                   print the names under which a release is published; an
                   empty IMAGE is none
  base [IMAGE]     print the base image and its digest, and whether it is another
                   one than IMAGE, which is published, was built on

  --write             take what is newer
  --govulncheck FILE  the govulncheck to ask for vulnerabilities
  --registry URL      ask this registry for images instead of their own
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(exitCode(run(ctx, os.Args[1:], os.Environ(), os.Stdout), os.Stderr))
}

// usageError is a command line that means nothing.
type usageError struct{ error }

func exitCode(err error, stderr io.Writer) int {
	if err == nil {
		return exitOK
	}
	_, _ = fmt.Fprintf(stderr, "upstream: %s\n", strings.TrimRight(err.Error(), "\n"))
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	return exitFailed
}

// run executes one command line. Its last deed is to tell GitHub, so that a
// failure leaves no outputs.
func run(ctx context.Context, args, env []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("upstream", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	write := flags.Bool("write", false, "")
	govulncheck := flags.String("govulncheck", "govulncheck", "")
	registry := flags.String("registry", "", "")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		_, err = io.WriteString(stdout, usage)
		return err
	} else if err != nil {
		return usageError{fmt.Errorf("%w\n\n%s", err, usage)}
	}
	args = flags.Args()

	var out outputs
	var err error
	switch images := (images{registry: *registry}); {
	case len(args) == 0:
		u := updater{env: env, images: images, govulncheck: *govulncheck, stdout: stdout}
		out, err = u.update(ctx, *write)
	case args[0] == "release" && len(args) <= 2:
		out, err = closeRelease(ctx, env, args[1:], stdout)
	case args[0] == "notes" && len(args) == 2:
		err = printNotes(args[1], stdout)
	case args[0] == "tags" && len(args) >= 3:
		out, err = printTags(ctx, env, args[1], args[2:], stdout)
	case args[0] == "base" && len(args) <= 2:
		out, err = printBase(ctx, images, args[1:], stdout)
	default:
		err = usageError{fmt.Errorf("cannot make sense of %q\n\n%s", strings.Join(args, " "), usage)}
	}
	if err != nil {
		return err
	}
	return out.appendTo(variable(env, "GITHUB_OUTPUT"))
}

// outputs are what a workflow reads: NAME=value lines.
type outputs []string

func (o *outputs) set(name, value string) {
	*o = append(*o, name+"="+value+"\n")
}

func (o *outputs) appendTo(path string) error {
	if path == "" || len(*o) == 0 {
		return nil
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("GITHUB_OUTPUT: %w", err)
	}
	_, err = f.WriteString(strings.Join(*o, ""))
	return errors.Join(err, f.Close())
}

// variable is the value of an environment variable, of which the last counts.
func variable(env []string, name string) string {
	value := ""
	for _, entry := range env {
		if v, ok := strings.CutPrefix(entry, name+"="); ok {
			value = v
		}
	}
	return value
}
