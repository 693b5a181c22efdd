package main

import (
	"bytes"
	"encoding/json"
	stdlog "log"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"derpd/cmd/derpd/internal/config"
)

// TestNewLogger asserts which lines the log has, and in which format. Lines of the
// standard log have client addresses: they are debug lines.
func TestNewLogger(t *testing.T) {
	flags := stdlog.Flags()
	t.Cleanup(func() {
		stdlog.SetFlags(flags)
		stdlog.SetOutput(os.Stderr)
	})
	written := func(c config.Log) string {
		var out bytes.Buffer
		log := newLogger(c, &out)
		log.Debug().Msg("a detail")
		log.Info().Msg("a message")
		log.Warn().Msg("a warning")
		stdlog.Print("from a library")
		return out.String()
	}

	for level, want := range map[zerolog.Level]string{
		zerolog.DebugLevel: "debug a detail, info a message, warn a warning, debug from a library",
		zerolog.InfoLevel:  "info a message, warn a warning",
		zerolog.WarnLevel:  "warn a warning",
		zerolog.ErrorLevel: "",
	} {
		var got []string
		for line := range strings.Lines(written(config.Log{Level: level, Format: config.LogJSON})) {
			var entry struct {
				Level, Message string
				Time           time.Time
			}
			if err := json.Unmarshal([]byte(line), &entry); err != nil {
				t.Fatalf("%v in %q", err, line)
			}
			if age := time.Since(entry.Time); age < -time.Minute || age > time.Minute {
				t.Errorf("the time of %q is %s ago", line, age)
			}
			got = append(got, entry.Level+" "+entry.Message)
		}
		if strings.Join(got, ", ") != want {
			t.Errorf("%s: %q, want %q", level, got, want)
		}
	}

	for format, isJSON := range map[string]bool{config.LogConsole: false, config.LogJSON: true, "": true} { // a buffer is no terminal
		out := written(config.Log{Level: zerolog.InfoLevel, Format: format})
		if strings.HasPrefix(out, "{") != isJSON || !strings.Contains(out, "a message") {
			t.Errorf("format %q: %q, want JSON %t", format, out, isJSON)
		}
	}
}
