package main

import (
	"context"
	"errors"
	"fmt"

	"derpd/cmd/derpd/internal/admin"
	"derpd/cmd/derpd/internal/config"
	"derpd/cmd/derpd/internal/node"
)

// printMap is the command `derpd derpmap`. The map of the running relay
// has the ports in use and the other nodes of the region. Without a running
// relay, the map is made from the configuration and the data directory.
func printMap(ctx context.Context, c *call) error {
	format := c.formatFlag()
	if err := c.parse(0); err != nil {
		return err
	}
	// A running relay may serve while its next configuration is invalid.
	addr, _ := config.AdminAddr(c.env)
	out, err := admin.Client{Addr: addr}.Map(ctx, string(*format))
	if err != nil {
		conf, invalid := config.Load(c.env)
		if invalid != nil {
			return c.configError(invalid)
		}
		if _, other := errors.AsType[admin.NotDerpdError](err); other {
			_, _ = fmt.Fprintf(c.stderr, "derpd: DERP_ADMIN_ADDR: %v; the map is made from the configuration\n", err)
		}
		out, err = node.StoppedMap(ctx, conf, string(*format))
	}
	if err != nil {
		return err
	}
	_, err = c.stdout.Write(out)
	return err
}
