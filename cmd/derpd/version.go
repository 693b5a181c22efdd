package main

import (
	"context"
	"fmt"
	"runtime/debug"
)

// version is set by the linker.
var version = "dev"

// printVersion is the command `derpd version`.
func printVersion(_ context.Context, c *call) error {
	if err := c.parse(0); err != nil {
		return err
	}
	_, err := fmt.Fprintf(c.stdout, "derpd %s, tailscale.com %s\n", version, upstreamVersion())
	return err
}

// upstreamVersion is the version of tailscale.com in this binary.
func upstreamVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if m.Path == "tailscale.com" {
				return m.Version
			}
		}
	}
	return "unknown"
}
