package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"derpd/cmd/derpd/internal/admin"
	"derpd/cmd/derpd/internal/config"
	"derpd/cmd/derpd/internal/node"
)

// pin is the command `derpd pin`.
func pin(ctx context.Context, c *call) error {
	rotate := c.flags.Bool("rotate", false, "make a new certificate (DERP_CERT_MODE=pinned), and print the new map that clients need")
	accept := c.flags.Bool("accept", false, "let the running relay serve the certificate of replaced files, and print the new map that clients need; with HASH, this certificate alone")
	format := c.formatFlag()
	if err := c.parseSome(0, 1); err != nil {
		return err
	}
	switch {
	case *accept && *rotate:
		return usageError{errors.New("pin: want --rotate or --accept, got both; --rotate needs no --accept")}
	case *accept:
		return acceptPin(ctx, c, c.flags.Arg(0), string(*format))
	case c.flags.NArg() > 0:
		return usageError{fmt.Errorf("pin: unexpected argument %q; only --accept has one", c.flags.Arg(0))}
	}
	conf, err := config.LoadForPin(c.env)
	if err != nil {
		return c.configError(err)
	}
	mode := conf.Certificate.Mode
	if *rotate && mode == config.ModeManual {
		return usageError{errors.New("pin: --rotate makes no certificate while DERP_CERT_MODE is manual; replace the files, and run `derpd pin --accept`")}
	}
	if mode != config.ModePinned && mode != config.ModeManual {
		return usageError{fmt.Errorf("pin: DERP_CERT_MODE is %s, so there is no pinned certificate; set DERP_CERT_MODE=pinned to use one", mode)}
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

// acceptPin orders the running relay to serve the certificate that waits in its files,
// and prints the new map.
func acceptPin(ctx context.Context, c *call, hash, format string) error {
	addr, err := config.AdminAddr(c.env)
	if err != nil {
		return c.configError(err)
	}
	out, err := admin.Client{Addr: addr}.AcceptPin(ctx, hash, format)
	if refused, ok := errors.AsType[admin.RefusedError](err); ok {
		return fmt.Errorf("pin: %w", refused)
	}
	if err != nil {
		return noAnswer(addr, err)
	}
	_, err = c.stdout.Write(out)
	return err
}
