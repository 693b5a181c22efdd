package main

import (
	"context"
	"fmt"
	"runtime/debug"

	"derpd/cmd/derpd/internal/config"
	"derpd/internal/release"
)

// version and source are set by the linker. source is the URL of the repository
// that publishes this build.
var version, source = "dev", ""

// printVersion is the command `derpd version`.
func printVersion(ctx context.Context, c *call) error {
	check := c.flags.Bool("check", false, "ask whether a newer release is out; exit code 0 is no, 3 is yes, 1 is no answer")
	if err := c.parse(0); err != nil {
		return err
	}
	build := thisBuild()
	if !*check {
		_, err := fmt.Fprintf(c.stdout, "derpd %s, tailscale.com %s\n", build.Version, build.Upstream)
		return err
	}
	answer, err := release.New(build, config.GoProxy(c.env)).Ask(ctx)
	if err != nil {
		return fmt.Errorf("version: it is not known whether a newer release is out: %w", err)
	}
	if _, err := fmt.Fprintln(c.stdout, answer.Text); err != nil {
		return err
	}
	if answer.Newer {
		return errNewer
	}
	return nil
}

// thisBuild describes this binary.
func thisBuild() release.Build {
	return release.Build{Version: version, Upstream: upstreamVersion(), Source: source}
}

// upstreamVersion is the version of tailscale.com in this binary.
func upstreamVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if m.Path == release.Module {
				return m.Version
			}
		}
	}
	return "unknown"
}
