package main

import (
	"context"
	"errors"
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
		return noAnswer(addr, err)
	}
	if _, err := io.WriteString(c.stdout, report); err != nil {
		return err
	}
	if !ready {
		return errPrinted
	}
	return nil
}

// noAnswer is the error of a command that asks the running relay in vain.
func noAnswer(addr string, err error) error {
	if _, other := errors.AsType[admin.NotDerpdError](err); other {
		return fmt.Errorf("DERP_ADMIN_ADDR: %w; set it to the admin address of the running relay", err)
	}
	return fmt.Errorf("no relay answers on DERP_ADMIN_ADDR %s: %w; start the relay, or set DERP_ADMIN_ADDR as the relay has it", addr, err)
}
