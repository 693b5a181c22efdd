package config

import "github.com/rs/zerolog"

// LogEnv is the log.
type LogEnv struct {
	LogLevel  string `envconfig:"DERP_LOG_LEVEL" default:"info" desc:"debug, info, warn or error; debug logs client addresses" zh:"debug、info、warn 或 error；debug 会写出客户端地址"`
	LogFormat string `envconfig:"DERP_LOG_FORMAT" desc:"json or console" zh:"json 或 console" or:"console on a terminal, else json" zhor:"在终端上为 console，否则为 json"`
}

// The formats of the log.
const (
	LogJSON    = "json"
	LogConsole = "console"
)

// Log is the log.
type Log struct {
	Level  zerolog.Level
	Format string // LogJSON or LogConsole; empty depends on the terminal
}

func parseLog(p *problems, env LogEnv) Log {
	l := Log{Format: env.LogFormat}
	switch env.LogLevel {
	case "debug", "info", "warn", "error":
		l.Level, _ = zerolog.ParseLevel(env.LogLevel)
	default:
		p.add("DERP_LOG_LEVEL", "want debug, info, warn or error, got %q", env.LogLevel)
	}
	switch env.LogFormat {
	case "", LogJSON, LogConsole:
	default:
		p.add("DERP_LOG_FORMAT", "want json or console, got %q", env.LogFormat)
	}
	return l
}
