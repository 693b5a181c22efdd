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

// Modules with releases that derpd follows.
const (
	tailscale = "tailscale.com"
	certmagic = "github.com/caddyserver/certmagic"
)

// module is the content of go.mod.
type module struct {
	goVersion string
	requires  map[string]string
}

// goCommand runs the go command, which handles GOPROXY, failing proxies,
// retractions and checksums.
func goCommand(ctx context.Context, dir string, env []string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	// The environment may pin the old toolchain, but a new release may need a
	// newer Go.
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

// releasesOf lists the versions of a module that are not retracted. It runs in an
// empty module, so that the state of go.sum has no influence.
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

// get adds modules, MODULE@VERSION, to go.mod, and a newer Go if a module needs one.
// With -e, tidy ignores modules that cannot be fetched: the tests of dependencies
// may need some. If derpd needs a missing module, the build fails.
func get(ctx context.Context, env, targets []string) error {
	if _, err := goCommand(ctx, "", env, append([]string{"get"}, targets...)...); err != nil {
		return err
	}
	_, err := goCommand(ctx, "", env, "mod", "tidy", "-e")
	return err
}
