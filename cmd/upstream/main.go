// Command upstream keeps derpd current. It finds the newest stable releases of
// Tailscale and certmagic, fixes of known vulnerabilities, and a newer base image.
// With --write it updates go.mod, go.sum, the Dockerfile, the READMEs and the
// changelog, if derpd then builds and its tests pass. Its other commands serve the
// release workflow.
//
// It works in the current directory, the root of derpd's repository. Modules come
// from GOPROXY, as for the go command, and logins of registries from `docker login`.
// When GITHUB_OUTPUT names a file, results for a workflow are appended to that file.
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

// Exit codes. "Something is new" has no exit code, because `go run` maps every
// failure to 1. The output shows new versions, and GITHUB_OUTPUT has updated=true.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

const usage = `usage: upstream [flags] [command]

  (none)           print newer versions of what derpd is built on
  release [LINE]   name the changelog's unreleased section, after adding LINE to
                   it, and print the version of that release
  notes VERSION    print the changelog's section of a release
  tags VERSION IMAGE...
                   print the names under which a release is published; an
                   empty IMAGE is ignored
  base [IMAGE]     print the base image with its digest, and whether the published
                   IMAGE was built on another one
  verify IMAGE...  check a published image: platforms, labels, user, health check,
                   size, files, and the release that its program prints; for this
                   machine's platform, the program is run
  copy IMAGE NAME...
                   give a published image more names, in any registry; all its
                   platforms, attestations and its digest stay the same
  check-patch FILE check a patch of the last commit: it may have nothing but what
                   --write writes; print its release
  vuln             fail if the code that is used has known vulnerabilities;
                   succeed, and print so, if their database cannot be reached

  --write             take the newer versions, if derpd builds and its tests pass
  --govulncheck FILE  the govulncheck program
  --registry URL      take all images from this registry
  --static            verify without running the program, for jobs with rights
  --timeout DURATION  limit of each question to the module proxy, and of verify and
                      copy for each image (default 5m)
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(exitCode(run(ctx, os.Args[1:], os.Environ(), os.Stdout), os.Stderr))
}

// usageError is an error in the command line.
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

// run executes one command line. It writes the outputs for GitHub last, so that a
// failed run writes none.
func run(ctx context.Context, args, env []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("upstream", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	write := flags.Bool("write", false, "")
	govulncheck := flags.String("govulncheck", "govulncheck", "")
	static := flags.Bool("static", false, "")
	registry := flags.String("registry", "", "")
	timeout := flags.Duration("timeout", fetchTimeout, "")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		_, err = io.WriteString(stdout, usage)
		return err
	} else if err != nil {
		return usageError{fmt.Errorf("%w\n\n%s", err, usage)}
	}
	args = flags.Args()

	var out outputs
	var err error
	tool := goTool{env: env, timeout: *timeout}
	u := updater{tool: tool, images: images{registry: *registry}, govulncheck: *govulncheck, stdout: stdout}
	switch {
	case *timeout <= 0:
		err = usageError{fmt.Errorf("--timeout: not above zero (got %v); use 5m, for example", *timeout)}
	case len(args) == 0:
		out, err = u.update(ctx, *write)
	case args[0] == "release" && len(args) <= 2:
		out, err = closeRelease(ctx, tool, args[1:], stdout)
	case args[0] == "notes" && len(args) == 2:
		err = printNotes(args[1], stdout)
	case args[0] == "tags" && len(args) >= 3:
		out, err = printTags(ctx, tool, args[1], args[2:], stdout)
	case args[0] == "base" && len(args) <= 2:
		out, err = printBase(ctx, u.images, args[1:], stdout)
	case args[0] == "verify" && len(args) >= 2:
		err = (&verifier{images: u.images, timeout: *timeout, static: *static, stdout: stdout}).verify(ctx, args[1:])
	case args[0] == "copy" && len(args) >= 3:
		err = u.images.copy(ctx, *timeout, args[1], args[2:], stdout)
	case args[0] == "check-patch" && len(args) == 2:
		out, err = checkPatch(ctx, env, args[1], stdout)
	case args[0] == "vuln" && len(args) == 1:
		err = u.refuseVulnerable(ctx)
	default:
		err = usageError{fmt.Errorf("unknown command or wrong number of arguments (got %q)\n\n%s", strings.Join(args, " "), usage)}
	}
	if err != nil {
		return err
	}
	return out.appendTo(variable(env, "GITHUB_OUTPUT"))
}

// outputs are the NAME=value lines that a workflow reads.
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

// variable returns the value of an environment variable. The last of several entries
// counts.
func variable(env []string, name string) string {
	value := ""
	for _, entry := range env {
		if v, ok := strings.CutPrefix(entry, name+"="); ok {
			value = v
		}
	}
	return value
}
