package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"go/version"
	"os"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/mod/modfile"
)

// derpd is the program that has to build. Its tests and those of the relay have to
// pass; they need no other program.
const derpd = "./cmd/derpd"

var tested = []string{derpd, "./relay/..."}

// take edits go.mod: it requires the targets, MODULE@VERSION, and the Go version
// that they need. It returns the modules and packages that could not be fetched and
// are not compiled. `go get` fails on such modules, so it is not used.
func take(ctx context.Context, tool goTool, before module, targets []string) (missing []string, err error) {
	goVersion, err := serves(ctx, tool, before.goVersion, targets)
	if err != nil {
		return nil, err
	}
	edit := []string{"mod", "edit", "-go=" + goVersion}
	for _, target := range targets {
		if !strings.HasPrefix(target, goTarget) {
			edit = append(edit, "-require="+target)
		}
	}
	if _, err := tool.fetch(ctx, "", edit...); err != nil {
		return nil, err
	}
	missing, err = tidy(ctx, tool)
	if err != nil {
		return nil, err
	}
	// Completes go.mod and go.sum where tidy failed, and fetches what is compiled.
	list := append([]string{"list", "-mod=mod", "-deps", "-test"}, tested...)
	if _, err := tool.fetch(ctx, "", list...); err != nil {
		return nil, fmt.Errorf("a module that is compiled cannot be fetched; nothing is changed: %w", err)
	}
	return missing, nil
}

// goTarget is the start of a target that is a Go version.
const goTarget = "go@"

// serves checks that the module proxy serves the targets. It returns the Go version
// that they need, which is available.
func serves(ctx context.Context, tool goTool, have string, targets []string) (goVersion string, err error) {
	goVersion, reason := have, ""
	for _, target := range targets {
		wants, isGo := strings.CutPrefix(target, goTarget)
		if !isGo {
			if wants, err = goOf(ctx, tool, target); err != nil {
				return "", unserved(target, err)
			}
		}
		if version.Compare("go"+wants, "go"+goVersion) > 0 {
			goVersion, reason = wants, target
		}
	}
	if reason != "" {
		err := inEmptyModule(goVersion, func(dir string) error {
			_, err := tool.fetch(ctx, dir, "version")
			return err
		})
		if err != nil {
			return "", fmt.Errorf("go %s: not available, but %s needs it; nothing is changed, try again later: %w", goVersion, reason, err)
		}
	}
	for _, target := range targets {
		if strings.HasPrefix(target, goTarget) {
			continue
		}
		err := inEmptyModule(goVersion, func(dir string) error {
			_, err := tool.fetch(ctx, dir, "mod", "download", target)
			return err
		})
		if err != nil {
			return "", unserved(target, err)
		}
	}
	return goVersion, nil
}

func unserved(target string, err error) error {
	return fmt.Errorf("%s: listed, but cannot be fetched; nothing is changed, try again later: %w", target, err)
}

// goOf returns the Go version that a module needs, with its patch number: toolchains
// without one do not exist.
func goOf(ctx context.Context, tool goTool, target string) (string, error) {
	var found struct{ GoMod string }
	err := inEmptyModule("", func(dir string) error {
		return tool.json(ctx, dir, &found, "list", "-m", "-json", target)
	})
	if err != nil {
		return "", err
	}
	text, err := os.ReadFile(found.GoMod)
	if err != nil {
		return "", err
	}
	parsed, err := modfile.ParseLax(found.GoMod, text, nil)
	if err != nil || parsed.Go == nil {
		return "", err
	}
	if wants := parsed.Go.Version; version.Lang("go"+wants) == "go"+wants {
		return wants + ".0", nil
	}
	return parsed.Go.Version, nil
}

// tidy runs go mod tidy, which also wants modules that only the tests of
// dependencies import. A failure is not an error: the build decides.
func tidy(ctx context.Context, tool goTool) (missing []string, err error) {
	_, stderr, err := tool.run(ctx, tool.timeout, "", "mod", "tidy", "-e")
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	missing = notFetched(string(stderr))
	switch {
	case errors.Is(err, errTimeout):
		missing = append(missing, fmt.Sprintf("others (no answer within %v)", tool.timeout))
	case err != nil && len(missing) == 0:
		missing = []string{"others (" + firstLine(stderr) + ")"}
	}
	return missing, nil
}

var (
	failedModule  = regexp.MustCompile(`([^\s:]+@v[^\s:]+): (?:reading|invalid|verifying|unrecognized|git|Get|unexpected)`)
	failedPackage = regexp.MustCompile(`(?:cannot find module providing package|no required module provides package) ([^\s:;]+)`)
)

// notFetched returns the modules and packages in the errors of go mod tidy, each
// once.
func notFetched(stderr string) []string {
	var missing []string
	for _, pattern := range []*regexp.Regexp{failedModule, failedPackage} {
		for _, m := range pattern.FindAllStringSubmatch(stderr, -1) {
			missing = append(missing, m[1])
		}
	}
	slices.SortFunc(missing, cmp.Compare)
	return slices.Compact(missing)
}

func firstLine(text []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(text)), "\n")
	return line
}

// judge builds derpd, with the flags of make build, and runs the tests.
func judge(ctx context.Context, tool goTool) error {
	if err := tool.compile(ctx, "build", "-trimpath", "-o", os.DevNull, derpd); err != nil {
		return fmt.Errorf("derpd does not build; nothing is changed: %w", err)
	}
	if err := tool.compile(ctx, append([]string{"test"}, tested...)...); err != nil {
		return fmt.Errorf("tests of derpd fail; nothing is changed: %w", err)
	}
	return nil
}
