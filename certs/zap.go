package certs

import (
	"slices"

	"github.com/rs/zerolog"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// zapLogger writes certmagic's log to log at debug level. faults.go logs errors for
// operators, once and with the authority's message.
func zapLogger(log zerolog.Logger) *zap.Logger {
	return zap.New(zapCore{log: log.With().Str("component", "certmagic").Logger()})
}

// zapCore is a [zapcore.Core] over zerolog.
type zapCore struct {
	log zerolog.Logger
}

// clientFields are the fields with a client's address. They are not logged.
var clientFields = []string{"remote", "remote_addr", "remote_ip", "remote_port"}

// Enabled implements [zapcore.LevelEnabler].
func (c zapCore) Enabled(zapcore.Level) bool { return c.log.GetLevel() <= zerolog.DebugLevel }

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
	event := c.log.Debug().Stringer("certmagic_level", e.Level).Fields(encode(fields))
	if e.LoggerName != "" {
		event = event.Str("logger", e.LoggerName)
	}
	event.Msg(e.Message)
	return nil
}

// Sync implements [zapcore.Core].
func (zapCore) Sync() error { return nil }

// encode returns the fields as a map, without clientFields.
func encode(fields []zapcore.Field) map[string]any {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		if !slices.Contains(clientFields, f.Key) {
			f.AddTo(enc)
		}
	}
	return enc.Fields
}
