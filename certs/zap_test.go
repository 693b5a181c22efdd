package certs

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"testing"

	"github.com/rs/zerolog"
	"go.uber.org/zap"
)

// The relay logs certmagic's log at level debug, without client addresses.
func TestZapLogger(t *testing.T) {
	log := func(level zerolog.Level) string {
		var out bytes.Buffer
		logger := zapLogger(zerolog.New(&out).Level(level)).Named("acme_client").With(zap.String("identifier", "derp.example.com"), zap.String("remote_ip", "192.0.2.7"))
		logger.Error("challenge failed", zap.String("remote", "192.0.2.7:5000"), zap.String("remote_addr", "192.0.2.7:5000"), zap.Int("remote_port", 5000), zap.Error(errors.New("no answer")))
		return out.String()
	}
	if got := log(zerolog.InfoLevel); got != "" {
		t.Errorf("at the level info: %s", got)
	}
	var got map[string]string
	if err := json.Unmarshal([]byte(log(zerolog.DebugLevel)), &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"level": "debug", "component": "certmagic", "certmagic_level": "error", "logger": "acme_client",
		"identifier": "derp.example.com", "error": "no answer", "message": "challenge failed",
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
