package debuglog

import (
	"bytes"
	"log"
	"testing"

	"github.com/rs/zerolog"
)

func TestWriter(t *testing.T) {
	var out bytes.Buffer
	for level, want := range map[zerolog.Level]string{
		zerolog.DebugLevel: `{"level":"debug","component":"http","message":"TLS handshake error from 192.0.2.1:4000"}` + "\n",
		zerolog.InfoLevel:  "",
	} {
		out.Reset()
		log.New(Writer(zerolog.New(&out).Level(level), "http"), "", 0).Println("TLS handshake error from 192.0.2.1:4000")
		if out.String() != want {
			t.Errorf("at level %s: %s, want %s", level, &out, want)
		}
	}
}
