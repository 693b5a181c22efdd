package main

import (
	"context"
	"errors"
	"io"
	stdlog "log"
	"os"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/rs/zerolog"

	"derpd/cmd/derpd/internal/config"
	"derpd/cmd/derpd/internal/host"
	"derpd/cmd/derpd/internal/node"
	"derpd/internal/debuglog"
	"derpd/internal/redact"
)

// serve is the command `derpd serve`, and the default. It returns nil when ctx
// ended it.
func serve(ctx context.Context, c *call) error {
	if err := c.parse(0); err != nil {
		return err
	}
	hangups := catchHangups()
	conf, err := config.Load(c.env)
	if err != nil {
		return c.configError(err)
	}
	log := newLogger(conf.Log, c.stderr)
	if limit := host.LimitMemory(); limit > 0 {
		log.Debug().Int64("bytes", limit).Msg("memory limit set below the container's")
	}
	n, err := node.New(ctx, conf, node.Options{
		Gateways: host.ContainerGateways(),
		Start:    c.start,
		Map:      c.stdout,
		Build:    thisBuild(),
		Log:      log,
	})
	if _, ok := errors.AsType[node.BindError](err); ok {
		return c.configError(err)
	}
	if err != nil {
		return err
	}
	reloadOnHangup(ctx, hangups, c.env, conf, n, log)
	return n.Run(ctx)
}

// newLogger returns the logger, and redirects the standard log to it at debug
// level: derpserver and other libraries log there, mostly about clients.
func newLogger(c config.Log, stderr io.Writer) zerolog.Logger {
	out := stderr
	if c.Format == config.LogConsole || c.Format == "" && isTerminal(stderr) {
		out = zerolog.ConsoleWriter{Out: stderr, TimeFormat: time.TimeOnly}
	}
	log := zerolog.New(redact.Writer(out)).Level(c.Level).With().Timestamp().Logger()
	stdlog.SetFlags(0)
	stdlog.SetOutput(debuglog.Writer(log, "stdlog"))
	return log
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && isatty.IsTerminal(f.Fd())
}
