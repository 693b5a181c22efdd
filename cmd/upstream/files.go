package main

import (
	"errors"
	"fmt"
	"go/version"
	"os"
	"regexp"
	"slices"
	"strings"
)

// Files that name versions.
const (
	dockerfile = "Dockerfile"
	changelog  = "CHANGELOG.md"
)

// versioned are the files that name versions. A newer version changes no other file.
var versioned = []string{"go.mod", "go.sum", dockerfile, "README.md", "README.zh-CN.md", changelog}

// fileSet maps the names of files to their texts.
type fileSet map[string]string

func readFiles() (fileSet, error) {
	files := fileSet{}
	for _, name := range versioned {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		files[name] = string(text)
	}
	return files, nil
}

// restore writes all files that changed back as they were read.
func (f fileSet) restore() error {
	var errs []error
	for name, text := range f {
		if now, err := os.ReadFile(name); err == nil && string(now) == text {
			continue
		}
		errs = append(errs, os.WriteFile(name, []byte(text), 0o644))
	}
	return errors.Join(errs...)
}

// write writes the edited texts, and returns the names of all files that changed
// since f was read, go.mod and go.sum included.
func (f fileSet) write(edited fileSet) ([]string, error) {
	for name, text := range edited {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	now, err := readFiles()
	if err != nil {
		return nil, err
	}
	var names []string
	for name, text := range now {
		if text != f[name] {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// adopt returns the other files with the versions of the new go.mod, and the name
// of the next release.
func (f fileSet) adopt(before, after module, fixes fixes) (fileSet, string, error) {
	image, err := goImage(f[dockerfile], after.goVersion)
	if err != nil {
		return nil, "", err
	}
	var lines []string
	note := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	if v := after.requires[tailscale]; v != before.requires[tailscale] {
		note("Built on tailscale.com %s (before: %s).", v, before.requires[tailscale])
	}
	if v := after.requires[certmagic]; v != before.requires[certmagic] {
		note("Certificates by certmagic %s (before: %s).", v, before.requires[certmagic])
	}
	if after.goVersion != before.goVersion {
		note("Go %s (before: %s), needed to build without Docker.", after.goVersion, before.goVersion)
	}
	for _, fix := range fixes {
		note("Security: %s.", fix)
	}
	history := parseHistory(f[changelog])
	release, err := history.close(after.requires[tailscale], lines)
	if err != nil {
		return nil, "", err
	}
	updated := func(text string) string {
		text = replaceVersion(text, strings.TrimPrefix(before.requires[tailscale], "v"), strings.TrimPrefix(after.requires[tailscale], "v"))
		text = replaceVersion(text, before.goVersion, after.goVersion)
		return replaceVersion(text, golang+language(before.goVersion), golang+language(after.goVersion))
	}
	return fileSet{
		dockerfile:        image,
		"README.md":       updated(f["README.md"]),
		"README.zh-CN.md": updated(f["README.zh-CN.md"]),
		changelog:         history.String(),
	}, release, nil
}

// golang is the name of Go's image, before the language version.
const golang = "golang:"

// language returns the first two numbers of a Go version.
func language(goVersion string) string {
	return strings.TrimPrefix(version.Lang("go"+goVersion), "go")
}

// goImage returns the Dockerfile with the Go version of go.mod. The image's tag
// has no patch number, so that a build takes the newest patch.
func goImage(dockerfile, goVersion string) (string, error) {
	line := regexp.MustCompile(`(?m)^(ARG GO_IMAGE=golang:)\d+\.\d+$`)
	if !line.MatchString(dockerfile) {
		return "", errors.New("the Dockerfile has no line ARG GO_IMAGE=golang:MAJOR.MINOR")
	}
	return line.ReplaceAllString(dockerfile, "${1}"+language(goVersion)), nil
}

// baseImage returns the name of the image on which the Dockerfile builds.
func baseImage(dockerfile string) (string, error) {
	found := regexp.MustCompile(`(?m)^ARG BASE_IMAGE=(\S+)$`).FindStringSubmatch(dockerfile)
	if found == nil {
		return "", errors.New("the Dockerfile has no line ARG BASE_IMAGE=IMAGE")
	}
	return found[1], nil
}
