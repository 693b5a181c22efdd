// Command derpd is a self-hosted relay for Tailscale and Headscale networks:
// a DERP relay, a STUN server and the TLS they need, configured by environment
// variables alone.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/rs/zerolog"
)

// version is set by the linker.
var version = "dev"

// Exit codes. Whoever restarts derpd can tell a configuration that will never
// work from a relay that failed.
const (
	exitOK      = 0
	exitFailed  = 1
	exitNoStart = 2
)

const usage = `usage: derpd [command]

  (none), serve   run the relay
  derpmap         print what to paste: --format policy | headscale | json
  pin             print the pinned certificate's hash and end
                  --rotate makes a new certificate, and prints the new map
  admit NODEKEY   ask every source of admission about a node
  env             print the configuration in force, without secrets
                  --example prints a file to fill in
  healthcheck     ask the running relay whether it is ready
  version         print the version

Configuration is by environment variables: derpd env lists them.
`

func main() {
	start := time.Now()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	// After the first signal the default is back: the second one kills.
	context.AfterFunc(ctx, stop)
	os.Exit(exitCode(run(ctx, start, os.Args[1:], os.Environ(), os.Stdout, os.Stderr), os.Stderr))
}

// noStart is an error in what derpd was told: the next start would end in the
// same way. Nothing on disk was changed.
type noStart struct{ error }

func (e noStart) Unwrap() error { return e.error }

// errQuiet is a failure that was printed already.
var errQuiet = errors.New("already printed")

// run executes one command line. The environment is read only from env.
func run(ctx context.Context, start time.Time, args, env []string, stdout, stderr io.Writer) error {
	command := "serve"
	if len(args) > 0 {
		command, args = args[0], args[1:]
	}
	switch command {
	case "serve":
		return serve(ctx, start, args, env, stdout, stderr)
	case "derpmap":
		return printMap(ctx, args, env, stdout, stderr)
	case "pin":
		return pin(ctx, args, env, stdout, stderr)
	case "admit":
		return askAdmission(ctx, args, env, stdout, stderr)
	case "env":
		return printEnvironment(args, env, stdout, stderr)
	case "healthcheck":
		return healthcheck(ctx, args, env, stdout)
	case "version":
		_, err := fmt.Fprintf(stdout, "derpd %s, tailscale.com %s\n", version, upstreamVersion())
		return err
	case "help", "-h", "--help":
		_, err := io.WriteString(stdout, usage)
		return err
	}
	return noStart{fmt.Errorf("unknown command %q\n\n%s", command, usage)}
}

// exitCode prints err for people and turns it into the exit code.
func exitCode(err error, stderr io.Writer) int {
	if err == nil {
		return exitOK
	}
	if !errors.Is(err, errQuiet) {
		_, _ = fmt.Fprintf(stderr, "derpd: %s\n", strings.TrimRight(err.Error(), "\n"))
	}
	if _, ok := errors.AsType[noStart](err); ok {
		return exitNoStart
	}
	return exitFailed
}

// configError says how many problems there are, and each on a line of its own.
func configError(err error) error {
	lines := strings.Split(err.Error(), "\n")
	if len(lines) == 1 {
		return noStart{fmt.Errorf("not started, nothing was changed: %w", err)}
	}
	return noStart{fmt.Errorf("not started, nothing was changed; %d problems:\n  %s", len(lines), strings.Join(lines, "\n  "))}
}

// upstreamVersion is the version of tailscale.com that was built in.
func upstreamVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if m.Path == "tailscale.com" {
				return m.Version
			}
		}
	}
	return "unknown"
}

// newLogger makes the logger, and leads the standard log to it: derpserver and
// others write there, about clients mostly.
func newLogger(c *config, stderr io.Writer) zerolog.Logger {
	out := stderr
	if c.logFormat == "console" || c.logFormat == "" && isTerminal(stderr) {
		out = zerolog.ConsoleWriter{Out: stderr, TimeFormat: time.TimeOnly}
	}
	log := zerolog.New(out).Level(c.logLevel).With().Timestamp().Logger()
	stdlog.SetFlags(0)
	stdlog.SetOutput(debugWriter{log.With().Str("component", "stdlog").Logger()})
	return log
}

// isTerminal reports whether a person reads w as it is written.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && isatty.IsTerminal(f.Fd())
}

// debugWriter takes lines for the debug level.
type debugWriter struct{ log zerolog.Logger }

func (w debugWriter) Write(p []byte) (int, error) {
	w.log.Debug().Msg(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}
