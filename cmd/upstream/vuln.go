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
	"strings"

	"golang.org/x/mod/semver"

	"derpd/internal/release"
)

// stdlib is the standard library as a module; its version is Go's.
const stdlib = "stdlib"

// fix is a vulnerability of derpd, and the version of the module that fixes it.
type fix struct {
	id      string
	module  string
	version string
}

func (f fix) String() string {
	if f.module == stdlib {
		return fmt.Sprintf("%s, fixed in Go %s", f.id, strings.TrimPrefix(f.version, "v"))
	}
	return fmt.Sprintf("%s, fixed in %s %s", f.id, f.module, f.version)
}

type fixes []fix

// targets returns MODULE@VERSION of each module once, with the highest version.
func (f fixes) targets() []string {
	highest := map[string]string{}
	for _, fix := range f {
		if release.IsStable(fix.version) && semver.Compare(fix.version, highest[fix.module]) > 0 {
			highest[fix.module] = fix.version
		}
	}
	var targets []string
	for module, version := range highest {
		if module == stdlib {
			module, version = "go", strings.TrimPrefix(version, "v")
		}
		targets = append(targets, module+"@"+version)
	}
	return targets
}

// errNoDatabase means that nothing was checked: the database of vulnerabilities, which
// many networks cannot reach, gave no answer.
var errNoDatabase = errors.New("the database of vulnerabilities cannot be reached")

// scan runs govulncheck on all packages.
func (u *updater) scan(ctx context.Context, format string) ([]byte, error) {
	out, stderr, err := execute(ctx, u.tool.timeout, "", u.tool.environ(), u.govulncheck, "-format", format, "./...")
	switch {
	case err == nil, ctx.Err() != nil:
		return out, err
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("%s is not installed", u.govulncheck)
	case errors.Is(err, errTimeout):
		return nil, fmt.Errorf("%w (no answer within %v)", errNoDatabase, u.tool.timeout)
	case bytes.Contains(stderr, []byte("fetching vulnerabilities")):
		return nil, fmt.Errorf("%w (%s)", errNoDatabase, firstLine(stderr))
	case len(bytes.TrimSpace(stderr)) == 0:
		return out, err
	}
	return out, fmt.Errorf("%w: %s", err, firstLine(stderr))
}

// refuseVulnerable returns an error if the code that derpd calls has known
// vulnerabilities. Without the database of vulnerabilities it succeeds, and prints
// that nothing was checked.
func (u *updater) refuseVulnerable(ctx context.Context) error {
	out, err := u.scan(ctx, "text")
	if errors.Is(err, errNoDatabase) {
		u.say("vulnerabilities", "NOT CHECKED: %v", err)
		return nil
	}
	_, _ = u.stdout.Write(out)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() == foundCode {
		return errors.New("known vulnerabilities; take the fixed versions with make upstream")
	}
	if err != nil {
		return fmt.Errorf("%s: %w", u.govulncheck, err)
	}
	return nil
}

// foundCode is the exit code of govulncheck's text format for vulnerabilities in the
// code that is called.
const foundCode = 3

// vulnerabilities prints the known vulnerabilities in the code that derpd calls,
// and returns those that a newer version fixes. It succeeds without govulncheck or
// its database.
func (u *updater) vulnerabilities(ctx context.Context) (fixes, error) {
	const what = "vulnerabilities"
	out, err := u.scan(ctx, "json")
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		u.say(what, "not checked: %v", err)
		return nil, nil
	}
	found, err := parseFindings(bytes.NewReader(out))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", u.govulncheck, err)
	}
	if len(found) == 0 {
		u.say(what, "none known in the code that is used")
	}
	var fixed fixes
	for _, f := range found {
		if f.version == "" {
			u.say(what, "%s in %s, not fixed yet", f.id, f.module)
			continue
		}
		u.say(what, "%s", f)
		fixed = append(fixed, f)
	}
	return fixed, nil
}

// parseFindings reads the output of govulncheck. It returns the vulnerabilities in
// functions that derpd calls, each once.
func parseFindings(r io.Reader) ([]fix, error) {
	var found []fix
	for decoder := json.NewDecoder(r); ; {
		var message struct {
			Finding *struct {
				OSV          string
				FixedVersion string `json:"fixed_version"`
				Trace        []struct{ Module, Function string }
			}
		}
		if err := decoder.Decode(&message); errors.Is(err, io.EOF) {
			return found, nil
		} else if err != nil {
			return nil, err
		}
		f := message.Finding
		// The first frame is the vulnerable one. Without a function, the package
		// is imported but not called.
		if f == nil || len(f.Trace) == 0 || f.Trace[0].Function == "" {
			continue
		}
		if one := (fix{f.OSV, f.Trace[0].Module, f.FixedVersion}); !slices.Contains(found, one) {
			found = append(found, one)
		}
	}
}
