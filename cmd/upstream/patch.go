package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/modfile"
)

const (
	// maxPatch limits a patch, in bytes. A new release of Tailscale with all its
	// dependencies changes less than 100 kB.
	maxPatch = 1 << 20
	// gitTimeout limits each command of git, which needs no network.
	gitTimeout = time.Minute
)

// tree is one state of the files that name versions.
type tree struct {
	files  fileSet
	module *modfile.File
}

// checkPatch checks a patch of the last commit by the job that runs the code of new
// releases, which may have changed the patch as well. The patch may have nothing but
// what `upstream --write` writes. A go.mod determines the other files, except for
// go.sum and fixed vulnerabilities in the changelog, so they are computed again.
func checkPatch(ctx context.Context, env []string, path string, stdout io.Writer) (outputs, error) {
	before, after, err := applied(ctx, env, path)
	if err != nil {
		return nil, fmt.Errorf("patch refused: %w", err)
	}
	was, is := moduleOf(before.module), moduleOf(after.module)
	expected, version, err := before.files.adopt(was, is, newFixes(before.files[changelog], after.files[changelog]))
	if err != nil {
		return nil, fmt.Errorf("patch refused: %w", err)
	}
	problems := append(moduleProblems(before.module, after.module), sumProblems(before.files["go.sum"], after.files["go.sum"])...)
	for _, name := range slices.Sorted(maps.Keys(expected)) {
		if text := after.files[name]; text != before.files[name] && text != expected[name] {
			problems = append(problems, name+": not what upstream --write makes of the new go.mod")
		}
	}
	if len(problems) > 0 {
		return nil, fmt.Errorf("patch refused:\n  %s", strings.Join(problems, "\n  "))
	}
	var out outputs
	out.set("to", is.requires[tailscale])
	if after.files[changelog] == before.files[changelog] {
		version = "" // not a release
	} else {
		out.set("version", version)
	}
	_, err = fmt.Fprintf(stdout, "patch accepted: tailscale.com %s -> %s, go %s -> %s, release %q\n",
		was.requires[tailscale], is.requires[tailscale], was.goVersion, is.goVersion, version)
	return out, err
}

// applied returns the files before and after the patch. git applies the patch to a
// copy of its index, so that the check reads it as `git apply` does. The work tree
// stays as it is.
func applied(ctx context.Context, env []string, patch string) (before, after tree, err error) {
	info, err := os.Stat(patch)
	if err != nil {
		return tree{}, tree{}, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxPatch {
		return tree{}, tree{}, fmt.Errorf("want a file of at most %d bytes, got %s with %d", maxPatch, info.Mode(), info.Size())
	}
	text, err := os.ReadFile(patch)
	if err != nil {
		return tree{}, tree{}, err
	}
	if strings.Contains("\n"+string(text), "\nGIT binary patch") {
		return tree{}, tree{}, errors.New("the patch is binary")
	}
	dir, err := os.MkdirTemp("", "upstream")
	if err != nil {
		return tree{}, tree{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	git := func(args ...string) (string, error) {
		out, stderr, err := execute(ctx, gitTimeout, "", append(env[:len(env):len(env)], "GIT_INDEX_FILE="+filepath.Join(dir, "index")), "git", args...)
		if err != nil {
			return "", fmt.Errorf("git %s: %w\n%s", args[0], err, stderr)
		}
		return string(out), nil
	}
	if _, err := git("read-tree", "HEAD"); err != nil {
		return tree{}, tree{}, err
	}
	if _, err := git("apply", "--cached", "--", patch); err != nil {
		return tree{}, tree{}, err
	}
	changes, err := git("diff-index", "--cached", "--raw", "-z", "--no-renames", "--no-abbrev", "HEAD")
	if err != nil {
		return tree{}, tree{}, err
	}
	if err := onlyTexts(changes); err != nil {
		return tree{}, tree{}, err
	}
	read := func(revision string) (t tree, err error) {
		t.files = fileSet{}
		for _, name := range versioned {
			if t.files[name], err = git("cat-file", "blob", revision+":"+name); err != nil {
				return tree{}, err
			}
		}
		t.module, err = modfile.Parse("go.mod", []byte(t.files["go.mod"]), nil)
		return t, err
	}
	if before, err = read("HEAD"); err != nil {
		return tree{}, tree{}, err
	}
	// A revision without a name is the index.
	after, err = read("")
	return before, after, err
}

// onlyTexts returns an error unless all changes, from git diff-index --raw -z, are new
// texts of the files that name versions.
func onlyTexts(changes string) error {
	const modified = ":100644 100644 "
	var problems []string
	fields := strings.Split(strings.TrimSuffix(changes, "\x00"), "\x00")
	for i := 0; i+1 < len(fields); i += 2 {
		what, name := fields[i], fields[i+1]
		switch {
		case !slices.Contains(versioned, name):
			problems = append(problems, fmt.Sprintf("%s: not one of %s", name, strings.Join(versioned, ", ")))
		case !strings.HasPrefix(what, modified) || !strings.HasSuffix(what, " M"):
			problems = append(problems, fmt.Sprintf("%s: not a new text of a regular file (%s)", name, what))
		}
	}
	if len(problems) > 0 {
		return errors.New("\n  " + strings.Join(problems, "\n  "))
	}
	return nil
}
