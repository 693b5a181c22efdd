package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"tailscale.com/types/key"

	"derpd/cmd/derpd/internal/admin"
	"derpd/cmd/derpd/internal/config"
)

// printAdmission is the command `derpd admit NODEKEY`. It exits with 1 when the
// node is refused.
func printAdmission(ctx context.Context, c *call) error {
	if err := c.parse(1); err != nil {
		return err
	}
	var node key.NodePublic
	if err := node.UnmarshalText([]byte(c.flags.Arg(0))); err != nil || node.IsZero() {
		return usageError{fmt.Errorf("admit: want nodekey: and 64 hex digits, as `tailscale status --json` shows it under PublicKey, got %q", c.flags.Arg(0))}
	}
	addr, err := config.AdminAddr(c.env)
	if err != nil {
		return configError(err)
	}
	admission, err := admin.Client{Addr: addr}.Admission(ctx, node)
	if _, other := errors.AsType[admin.NotDerpdError](err); other {
		return err
	}
	if err != nil {
		return fmt.Errorf("no relay answers on DERP_ADMIN_ADDR %s, and only a running relay can ask the sources of admission: %w", addr, err)
	}
	if _, err := io.WriteString(c.stdout, admission.String()); err != nil {
		return err
	}
	if !admission.Admitted {
		return errPrinted
	}
	return nil
}
