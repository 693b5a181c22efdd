package main

import (
	"context"
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
		return c.configError(err)
	}
	admission, err := admin.Client{Addr: addr}.Admission(ctx, node)
	if err != nil {
		return noAnswer(addr, err)
	}
	if _, err := io.WriteString(c.stdout, admission.String()); err != nil {
		return err
	}
	if !admission.Admitted {
		return errPrinted
	}
	return nil
}
