package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"derpd/internal/release"
)

// Modules with releases that derpd follows.
const (
	tailscale = release.Module
	certmagic = "github.com/caddyserver/certmagic"
)

// module is the content of go.mod.
type module struct {
	goVersion string
	requires  map[string]string
}

func readModule(ctx context.Context, tool goTool) (module, error) {
	var parsed struct {
		Go      string
		Require []struct{ Path, Version string }
	}
	if err := tool.json(ctx, "", &parsed, "mod", "edit", "-json"); err != nil {
		return module{}, err
	}
	m := module{goVersion: parsed.Go, requires: map[string]string{}}
	for _, r := range parsed.Require {
		m.requires[r.Path] = r.Version
	}
	return m, nil
}

// releasesOf lists the versions of a module without the retracted ones. The newest
// version has the list of retracted ones. If it is not served, retractions is an
// error, and released has all versions.
func releasesOf(ctx context.Context, tool goTool, path string) (released []string, retractions, err error) {
	var parsed struct{ Versions []string }
	err = inEmptyModule("", func(dir string) error {
		retractions = tool.json(ctx, dir, &parsed, "list", "-m", "-versions", "-json", path)
		if retractions == nil || errors.Is(retractions, errTimeout) {
			return retractions
		}
		return tool.json(ctx, dir, &parsed, "list", "-m", "-versions", "-retracted", "-json", path)
	})
	return parsed.Versions, retractions, err
}

// inEmptyModule calls f with the directory of a module that requires nothing, so
// that derpd's go.mod and go.sum have no influence. An empty goVersion gives the
// module no go line.
func inEmptyModule(goVersion string, f func(dir string) error) error {
	dir, err := os.MkdirTemp("", "upstream")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	text := "module question\n"
	if goVersion != "" {
		text += "go " + goVersion + "\n"
	}
	if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte(text), 0o644); err != nil {
		return err
	}
	return f(dir)
}

// json parses the output of a go command that asks the module proxy.
func (g goTool) json(ctx context.Context, dir string, into any, args ...string) error {
	out, err := g.fetch(ctx, dir, args...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(out, into); err != nil {
		return fmt.Errorf("%s: %w", commandLine(args), err)
	}
	return nil
}
