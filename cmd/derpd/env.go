package main

import (
	"context"

	"derpd/cmd/derpd/internal/config"
)

// printEnvironment is the command `derpd env`.
func printEnvironment(_ context.Context, c *call) error {
	example := c.flags.Bool("example", false, "print an environment file to fill in")
	if err := c.parse(0); err != nil {
		return err
	}
	if *example {
		return config.WriteExample(c.stdout)
	}
	conf, err := config.Load(c.env)
	if err := conf.WriteEffective(c.stdout); err != nil {
		return err
	}
	if err != nil {
		return c.configError(err)
	}
	return nil
}
