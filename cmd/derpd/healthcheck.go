package main

import (
	"context"
	"fmt"
	"io"

	"derpd/cmd/derpd/internal/admin"
	"derpd/cmd/derpd/internal/config"
)

// healthcheck is the command `derpd healthcheck`. A container without a shell
// runs it as its HEALTHCHECK.
func healthcheck(ctx context.Context, c *call) error {
	if err := c.parse(0); err != nil {
		return err
	}
	// The running relay reports errors in its configuration itself.
	addr, _ := config.AdminAddr(c.env)
	report, ready, err := admin.Client{Addr: addr}.Ready(ctx)
	if err != nil {
		return fmt.Errorf("no relay answers on DERP_ADMIN_ADDR %s: %w", addr, err)
	}
	if _, err := io.WriteString(c.stdout, report); err != nil {
		return err
	}
	if !ready {
		return errPrinted
	}
	return nil
}
