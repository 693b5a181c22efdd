package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"

	"golang.org/x/mod/semver"
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
		if isRelease(fix.version) && semver.Compare(fix.version, highest[fix.module]) > 0 {
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

// vulnerabilities prints the known vulnerabilities in the code that derpd calls, and
// returns the fixes of newer versions. It succeeds without govulncheck, and without
// the database, which many networks cannot reach.
func (u *updater) vulnerabilities(ctx context.Context) (fixes, error) {
	const what = "vulnerabilities"
	cmd := exec.CommandContext(ctx, u.govulncheck, "-format", "json", "./...")
	cmd.Env = append(u.env[:len(u.env):len(u.env)], "GOTOOLCHAIN=auto", "GOWORK=off")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if errors.Is(err, exec.ErrNotFound) {
		u.say(what, "not checked: %s is not installed", u.govulncheck)
		return nil, nil
	}
	if err != nil {
		reason, _, _ := strings.Cut(strings.TrimSpace(stderr.String()), "\n")
		u.say(what, "not checked: %v: %s", err, reason)
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
