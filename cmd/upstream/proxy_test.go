package main

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// derpd itself, put back to an older release by hand, comes up to the newest
// one that the configured module proxy has.
func TestRealProxy(t *testing.T) {
	released, err := releasesOf(t.Context(), os.Environ(), tailscale)
	if err != nil {
		t.Skipf("the module proxy cannot be asked: %v", err)
	}
	best, _ := newest(released, true)
	older, ok := newest(keep(released, func(v version) bool { return v.compare(best) < 0 && v[1] != best[1] }), true)
	if !ok {
		t.Skipf("the module proxy knows no release before %s", best)
	}

	t.Chdir(copyOfDerpd(t))
	here, err := readModule(t.Context(), os.Environ())
	if err != nil {
		t.Fatal(err)
	}
	edit := "-require=" + tailscale + "@" + older.String()
	if _, err := goCommand(t.Context(), "", os.Environ(), "mod", "edit", edit); err != nil {
		t.Fatal(err)
	}
	var stdout bytes.Buffer
	env := append(os.Environ(), "GITHUB_OUTPUT=")
	err = run(t.Context(), []string{"--write", "--registry", newRegistry(t)}, env, &stdout)
	if err != nil && here.requires[tailscale] != best.String() {
		t.Skipf("%s is listed, but cannot be fetched: %v", best, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Log(stdout.String())
	after, err := readModule(t.Context(), os.Environ())
	if err != nil {
		t.Fatal(err)
	}
	if after.requires[tailscale] != best.String() {
		t.Errorf("go.mod has %s, want %s", after.requires[tailscale], best)
	}
	if want := tailscale + "                    " + older.String() + " -> " + best.String() + "\n"; !strings.HasPrefix(stdout.String(), want) {
		t.Errorf("it says\n%swant first\n%s", &stdout, want)
	}
}

func keep(released []string, good func(version) bool) []string {
	var kept []string
	for _, s := range released {
		if v, ok := parseVersion(s); ok && good(v) {
			kept = append(kept, s)
		}
	}
	return kept
}

// copyOfDerpd copies what upstream reads and what go.mod is made from.
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
		case strings.HasSuffix(name, ".go"), strings.HasPrefix(name, "go."), strings.HasSuffix(name, ".md"), name == dockerfile:
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, name), text, 0o644)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return dir
}
