package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/rs/zerolog"

	"derpd/cmd/derpd/internal/config"
	"derpd/cmd/derpd/internal/node"
)

// catchHangups returns a channel of SIGHUPs. The signal then does not end the process.
func catchHangups() chan os.Signal {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	return hangups
}

// reloadOnHangup reads files again at each SIGHUP, until ctx ends. Lists of node keys
// and certificates take effect at once, and without the signal some seconds after a
// change. The environment of a process cannot change, but the files of NAME_FILE can.
// derpd logs these variables, which need a restart.
func reloadOnHangup(ctx context.Context, hangups chan os.Signal, env []string, before *config.Config, n *node.Node, log zerolog.Logger) {
	go func() {
		defer signal.Stop(hangups)
		for {
			select {
			case <-ctx.Done():
				return
			case <-hangups:
			}
			log.Info().Strs("files", n.Reload()).Msg("SIGHUP: files read again; every other setting needs a restart")
			after, err := config.Load(env)
			if err != nil {
				log.Error().Err(err).Msg("SIGHUP: the configuration has a problem now, and derpd would not start again; the one that runs stays in force")
			} else if changed := before.Changed(after); len(changed) > 0 {
				log.Warn().Strs("variables", changed).Msg("SIGHUP: the files of these variables have changed; restart derpd to use them")
			}
		}
	}()
}
