package main

import (
	"context"
	"fmt"
	"time"

	"derpd/cmd/derpd/internal/config"
	"derpd/cmd/derpd/internal/node"
)

// pin is the command `derpd pin`.
func pin(ctx context.Context, c *call) error {
	rotate := c.flags.Bool("rotate", false, "make a new certificate, and print the new map that clients need")
	format := c.formatFlag()
	if err := c.parse(0); err != nil {
		return err
	}
	conf, err := config.LoadForPin(c.env)
	if err != nil {
		return c.configError(err)
	}
	if conf.Certificate.Mode != config.ModePinned {
		return usageError{fmt.Errorf("pin: DERP_CERT_MODE is %s, so there is no pinned certificate; set DERP_CERT_MODE=pinned to use one", conf.Certificate.Mode)}
	}
	if *rotate {
		return rotatePin(ctx, c, conf, string(*format))
	}
	hash, until, err := node.Pin(conf)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.stdout, "%s until %s\n", hash, until.Format(time.DateOnly))
	return err
}

// rotatePin makes a new certificate, and prints the new map.
func rotatePin(ctx context.Context, c *call, conf *config.Config, format string) error {
	if err := node.RotatePinned(ctx, conf, time.Now()); err != nil {
		return err
	}
	out, err := node.StoppedMap(ctx, conf, format)
	if err != nil {
		return err
	}
	_, err = c.stdout.Write(out)
	return err
}
