package main

import (
	"fmt"
	"go/version"
	"maps"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/mod/modfile"
	"golang.org/x/mod/semver"

	"derpd/internal/release"
)

// moduleOf returns what a parsed go.mod requires.
func moduleOf(f *modfile.File) module {
	m := module{requires: map[string]string{}}
	if f.Go != nil {
		m.goVersion = f.Go.Version
	}
	for _, r := range f.Require {
		m.requires[r.Mod.Path] = r.Mod.Version
	}
	return m
}

// moduleProblems compares two states of go.mod. Only the Go version and the versions
// of requirements may change, and only upwards. Tailscale and certmagic stay at
// releases. Modules that derpd does not import itself may come and go, as `go mod tidy`
// needs them. It changes both.
func moduleProblems(before, after *modfile.File) []string {
	was, is := moduleOf(before), moduleOf(after)
	var problems []string
	refuse := func(format string, args ...any) {
		problems = append(problems, "go.mod: "+fmt.Sprintf(format, args...))
	}
	if was.goVersion != is.goVersion && (!regexp.MustCompile(`^\d+\.\d+\.\d+$`).MatchString(is.goVersion) || version.Compare("go"+is.goVersion, "go"+was.goVersion) < 0) {
		refuse("go %s after %s; want a newer release", is.goVersion, was.goVersion)
	}
	if len(is.requires) != len(after.Require) {
		refuse("a module is required twice")
	}
	for _, path := range []string{tailscale, certmagic} {
		if v := is.requires[path]; v != was.requires[path] && (v == "" || release.Newest([]string{v}, path == tailscale) == "") {
			refuse("%s %s is not a release", path, v)
		}
	}
	indirect := map[string]bool{}
	for _, r := range after.Require {
		indirect[r.Mod.Path] = r.Indirect
		have, known := was.requires[r.Mod.Path]
		if known && semver.Compare(r.Mod.Version, have) < 0 {
			refuse("%s goes back from %s to %s", r.Mod.Path, have, r.Mod.Version)
		}
		if !known && !r.Indirect {
			refuse("%s is new, but derpd does not import it", r.Mod.Path)
		}
	}
	for _, r := range before.Require {
		if now, still := indirect[r.Mod.Path]; !r.Indirect && (!still || now) {
			refuse("%s is gone, but derpd imports it", r.Mod.Path)
		}
	}
	if was.goVersion == is.goVersion && maps.Equal(was.requires, is.requires) {
		refuse("no version changes")
	}
	// The rest: the module's name, toolchain, replace, exclude, tool and other lines.
	if without(before) != without(after) {
		refuse("a line changes that is no version (replace, exclude, retract, tool, toolchain, godebug or a comment)")
	}
	return problems
}

// without returns the text of go.mod without requirements and the Go version. It
// changes f.
func without(f *modfile.File) string {
	for _, r := range f.Require {
		if r.Syntax != nil {
			_ = f.DropRequire(r.Mod.Path) // its error is always nil
		}
	}
	f.DropGoStmt()
	f.Cleanup()
	return string(modfile.Format(f.Syntax))
}

var sumLine = regexp.MustCompile(`^(\S+ v\S+) (h1:[A-Za-z0-9+/]{43}=)$`)

// sumProblems compares two states of go.sum. A hash never changes.
func sumProblems(before, after string) []string {
	hashes := map[string]string{}
	for line := range strings.Lines(before) {
		if m := sumLine.FindStringSubmatch(strings.TrimSuffix(line, "\n")); m != nil {
			hashes[m[1]] = m[2]
		}
	}
	var problems []string
	for line := range strings.Lines(after) {
		m := sumLine.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil {
			problems = append(problems, fmt.Sprintf("go.sum: %.200q is no hash of a module", line))
			continue
		}
		if hash, known := hashes[m[1]]; known && hash != m[2] {
			problems = append(problems, fmt.Sprintf("go.sum: another hash of %s", m[1]))
		}
		hashes[m[1]] = m[2]
	}
	return problems
}

var securityLine = regexp.MustCompile(`^- Security: (GO-[0-9-]+), fixed in (Go|[A-Za-z0-9./_~-]+) (v?[0-9][0-9A-Za-z.+-]*)\.$`)

// newFixes returns the fixed vulnerabilities that the changelog has since before.
func newFixes(before, after string) fixes {
	old := strings.Split(before, "\n")
	var found fixes
	for _, line := range strings.Split(after, "\n") {
		m := securityLine.FindStringSubmatch(line)
		if m == nil || slices.Contains(old, line) {
			continue
		}
		if m[2] == "Go" {
			m[2] = stdlib
		}
		found = append(found, fix{id: m[1], module: m[2], version: m[3]})
	}
	return found
}
