package main

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"
)

// printTimeout limits `derpd version`, which needs milliseconds.
const printTimeout = 30 * time.Second

// binary checks the program of one platform: the build information that the Go linker
// leaves, and the release that the program prints.
func (v *verifier) binary(ctx context.Context, platform string, program []byte, release string) {
	info, err := buildinfo.Read(bytes.NewReader(program))
	if err != nil {
		v.say(platform, "binary", err, "")
		return
	}
	v.say(platform, "binary", builtFor(info, platform), "%s for %s by %s", info.Path, platform, info.GoVersion)
	if release == "" {
		return // the image does not say what it is
	}
	upstream := dependency(info, tailscale)
	var problem error
	if on, _, _ := strings.Cut(release, "-"); upstream != "v"+on {
		problem = fmt.Errorf("%s %s is in the binary; release %s needs v%s", tailscale, upstream, release, on)
	}
	v.say(platform, "upstream", problem, "%s %s", tailscale, upstream)

	text := fmt.Sprintf("derpd %s, %s %s", release, tailscale, upstream)
	if !v.static && platform == runtime.GOOS+"/"+runtime.GOARCH {
		v.say(platform, "prints", prints(ctx, program, text), "%s", text)
		return
	}
	// The linker ends the text of a variable with a zero byte. The build information
	// has no linker flags, because of -trimpath.
	problem = nil
	if !bytes.Contains(program, []byte(release+"\x00")) {
		problem = fmt.Errorf("the binary does not contain the text %s", release)
	}
	v.say(platform, "prints", problem, "%s; not run, found in the binary", release)
}

// dependency returns the version of a module in a binary.
func dependency(info *debug.BuildInfo, path string) string {
	for _, m := range info.Deps {
		if m.Path == path {
			return m.Version
		}
	}
	return "none"
}

// builtFor returns an error unless the binary is derpd for the platform, without C.
func builtFor(info *debug.BuildInfo, platform string) error {
	settings := make(map[string]string)
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	got := settings["GOOS"] + "/" + settings["GOARCH"]
	if settings["GOARCH"] == "arm" {
		arm, _, _ := strings.Cut(settings["GOARM"], ",")
		got += "/v" + arm
	}
	switch {
	case info.Path != "derpd/cmd/derpd":
		return fmt.Errorf("%s; want derpd/cmd/derpd", info.Path)
	case got != platform:
		return fmt.Errorf("built for %s; want %s", got, platform)
	case settings["CGO_ENABLED"] != "0":
		return errors.New("built with CGO_ENABLED=1; the image has no C library")
	}
	return nil
}

// prints runs `derpd version`, without any variable of the environment.
func prints(ctx context.Context, program []byte, want string) (err error) {
	dir, err := os.MkdirTemp("", "upstream")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	path := filepath.Join(dir, "derpd")
	if err := os.WriteFile(path, program, 0o700); err != nil {
		return err
	}
	out, stderr, err := execute(ctx, printTimeout, dir, []string{}, path, "version")
	if err != nil {
		return fmt.Errorf("derpd version: %w: %s", err, firstLine(stderr))
	}
	if got := firstLine(out); got != want {
		return fmt.Errorf("%q; want %q", got, want)
	}
	return nil
}
