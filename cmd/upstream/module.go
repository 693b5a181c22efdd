package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// What derpd is built on, besides Go.
const (
	tailscale = "tailscale.com"
	certmagic = "github.com/caddyserver/certmagic"
)

// module is what go.mod says.
type module struct {
	goVersion string
	requires  map[string]string
}

// goCommand runs the go command, which knows GOPROXY, proxies' faults,
// retractions and checksums better than anything else could.
func goCommand(ctx context.Context, dir string, env []string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	// Whoever pinned the toolchain pinned the old one: a release may need a
	// newer one than that.
	cmd.Env = append(env[:len(env):len(env)], "GOTOOLCHAIN=auto", "GOWORK=off")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return out, nil
}

func readModule(ctx context.Context, env []string) (module, error) {
	out, err := goCommand(ctx, "", env, "mod", "edit", "-json")
	if err != nil {
		return module{}, err
	}
	var parsed struct {
		Go      string
		Require []struct{ Path, Version string }
	}
	if err := json.Unmarshal(out, &parsed); err != nil {
		return module{}, fmt.Errorf("go mod edit -json: %w", err)
	}
	m := module{goVersion: parsed.Go, requires: map[string]string{}}
	for _, r := range parsed.Require {
		m.requires[r.Path] = r.Version
	}
	return m, nil
}

// releasesOf lists the versions of a module without the retracted ones. It asks
// from a module of its own, so that nothing depends on the state of go.sum.
func releasesOf(ctx context.Context, env []string, path string) ([]string, error) {
	dir, err := os.MkdirTemp("", "upstream")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module question\n"), 0o644); err != nil {
		return nil, err
	}
	out, err := goCommand(ctx, dir, env, "list", "-m", "-versions", "-json", path)
	if err != nil {
		return nil, err
	}
	var parsed struct{ Versions []string }
	if err := json.Unmarshal(out, &parsed); err != nil {
		return nil, fmt.Errorf("go list -m -versions -json %s: %w", path, err)
	}
	return parsed.Versions, nil
}

// get takes modules at versions, MODULE@VERSION, and Go with them if they need
// a newer one. -e goes on where what only the tests of dependencies need cannot
// be fetched; what derpd needs itself is found missing when it is built.
func get(ctx context.Context, env, targets []string) error {
	if _, err := goCommand(ctx, "", env, append([]string{"get"}, targets...)...); err != nil {
		return err
	}
	_, err := goCommand(ctx, "", env, "mod", "tidy", "-e")
	return err
}
