package main

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/mod/semver"

	"derpd/internal/release"
)

// A copy of derpd with an older Tailscale is updated to the newest release of the
// configured module proxy. derpd in it is an empty program, since a new release is
// compiled for minutes; make upstream-test builds and tests the real one.
func TestRealProxy(t *testing.T) {
	tool := goTool{env: os.Environ(), timeout: fetchTimeout}
	released, _, err := releasesOf(t.Context(), tool, tailscale)
	if err != nil {
		t.Skipf("the module proxy does not answer: %v", err)
	}
	best := release.Newest(released, true)
	older := release.Newest(slices.DeleteFunc(released, func(v string) bool {
		return semver.Compare(v, best) >= 0 || semver.MajorMinor(v) == semver.MajorMinor(best)
	}), true)
	if older == "" {
		t.Skipf("the module proxy has no release before %s", best)
	}

	t.Chdir(copyOfDerpd(t))
	here, err := readModule(t.Context(), tool)
	if err != nil {
		t.Fatal(err)
	}
	edit := "-require=" + tailscale + "@" + older
	if _, err := tool.fetch(t.Context(), "", "mod", "edit", edit); err != nil {
		t.Fatal(err)
	}
	var stdout bytes.Buffer
	env := append(os.Environ(), "GITHUB_OUTPUT=")
	registry, _ := startRegistry(t)
	err = run(t.Context(), []string{"--write", "--registry", registry}, env, &stdout)
	if err != nil && here.requires[tailscale] != best && strings.Contains(err.Error(), "cannot be fetched") {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Log(stdout.String())
	after, err := readModule(t.Context(), tool)
	if err != nil {
		t.Fatal(err)
	}
	if after.requires[tailscale] != best {
		t.Errorf("go.mod has %s, want %s", after.requires[tailscale], best)
	}
	if want := tailscale + "                    " + older + " -> " + best + "\n"; !strings.HasPrefix(stdout.String(), want) {
		t.Errorf("output\n%swant first\n%s", &stdout, want)
	}
}

// copyOfDerpd copies the files that upstream and the go command read, without tests,
// and with an empty main function.
func copyOfDerpd(t *testing.T) string {
	root, dir := filepath.Join("..", ".."), t.TempDir()
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		switch {
		case entry.IsDir() && (entry.Name() == ".git" || entry.Name() == "testdata" || name == "data"):
			return fs.SkipDir
		case entry.IsDir():
			return os.MkdirAll(filepath.Join(dir, name), 0o755)
		case strings.HasSuffix(name, "_test.go"):
			return nil
		case strings.HasSuffix(name, ".go"), strings.HasPrefix(name, "go."), strings.HasSuffix(name, ".md"), name == dockerfile:
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if filepath.Dir(name) == filepath.Join("cmd", "derpd") {
				text = []byte("package main\n")
			}
			return os.WriteFile(filepath.Join(dir, name), text, 0o644)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cmd", "derpd", "main.go"), []byte("package main\n\nfunc main() {}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}
