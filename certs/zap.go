package certs

import (
	"slices"

	"github.com/rs/zerolog"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// zapLogger writes certmagic's log to log. What certmagic calls information is
// detail here; its errors are warnings, since it tries again by itself.
func zapLogger(log zerolog.Logger) *zap.Logger {
	return zap.New(zapCore{log: log.With().Str("component", "certmagic").Logger()})
}

type zapCore struct {
	log zerolog.Logger
}

// clientFields name the address of whoever connects; it stays out of the log.
var clientFields = []string{"remote", "remote_addr", "remote_ip", "remote_port"}

func level(l zapcore.Level) zerolog.Level {
	if l >= zapcore.WarnLevel {
		return zerolog.WarnLevel
	}
	return zerolog.DebugLevel
}

// Enabled implements [zapcore.LevelEnabler].
func (c zapCore) Enabled(l zapcore.Level) bool { return level(l) >= c.log.GetLevel() }

// With implements [zapcore.Core].
func (c zapCore) With(fields []zapcore.Field) zapcore.Core {
	return zapCore{log: c.log.With().Fields(encode(fields)).Logger()}
}

// Check implements [zapcore.Core].
func (c zapCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

// Write implements [zapcore.Core].
func (c zapCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	event := c.log.WithLevel(level(e.Level)).Fields(encode(fields))
	if e.LoggerName != "" {
		event = event.Str("logger", e.LoggerName)
	}
	event.Msg(e.Message)
	return nil
}

// Sync implements [zapcore.Core].
func (zapCore) Sync() error { return nil }

func encode(fields []zapcore.Field) map[string]any {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		if !slices.Contains(clientFields, f.Key) {
			f.AddTo(enc)
		}
	}
	return enc.Fields
}
