package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"derpd/certs"
	"derpd/cmd/derpd/internal/host"
)

// pin is the command `derpd pin`.
func pin(ctx context.Context, args, env []string, stdout, stderr io.Writer) error {
	flags := newFlags("pin", stderr)
	rotate := flags.Bool("rotate", false, "make a new certificate; clients need the new map")
	format := formatFlag(flags)
	if err := parseFlags(flags, args); err != nil {
		return err
	}
	c, err := readConfig(env)
	if err != nil {
		return configError(err)
	}
	if c.mode != modePinned {
		return noStart{fmt.Errorf("pin: DERP_CERT_MODE is %s, there is no pinned certificate", c.mode)}
	}
	if *rotate {
		return rotatePin(ctx, c, string(*format), stdout)
	}
	m, err := certs.LoadPinned(c.pinned)
	if err != nil {
		return err
	}
	status := m.Status()
	_, err = fmt.Fprintf(stdout, "%s until %s\n", status.Pin, status.Leaf.NotAfter.Format(time.DateOnly))
	return err
}

// rotatePin makes a new certificate, which a running relay takes at once, and
// prints the map that clients need from now on.
func rotatePin(ctx context.Context, c *config, format string, stdout io.Writer) error {
	pinned := c.pinned
	var f host.Addresses
	if c.needsDiscovery() {
		f = host.PublicAddresses(ctx, c.discovery)
	}
	pinned.Names = c.names(f)
	if len(pinned.Names) == 0 {
		return errNoName
	}
	if err := certs.RotatePinned(pinned, time.Now()); err != nil {
		return err
	}
	out, err := mapOfStopped(ctx, c, format)
	if err != nil {
		return err
	}
	_, err = stdout.Write(out)
	return err
}
