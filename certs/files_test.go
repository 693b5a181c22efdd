package certs

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// A change of the files is loaded, logged and counted once.
func TestReloadOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pinned.pem")
	c := PinnedConfig{Path: path, Names: []string{"derp.example.com"}}
	if err := RotatePinned(c, time.Now()); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	f, err := newFiles([]string{path}, c.load, nil, zerolog.New(&log))
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		change       func() error
		reloads, bad uint64
		level        string // of the one line in the log
	}{
		{func() error { return nil }, 0, 0, ""},
		{func() error { return RotatePinned(c, time.Now()) }, 1, 0, "info"},
		{func() error { return os.WriteFile(path, []byte("nonsense"), 0o600) }, 1, 1, "error"},
		{func() error { return RotatePinned(c, time.Now()) }, 2, 1, "info"},
	} {
		log.Reset()
		if err := step.change(); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			f.reload()
		}
		s := f.Status()
		if s.Reloads != step.reloads || s.ReloadErrors != step.bad || (s.Err != nil) != (step.level == "error") || s.Leaf == nil {
			t.Errorf("%d reloads, %d errors, %v; want %d and %d", s.Reloads, s.ReloadErrors, s.Err, step.reloads, step.bad)
		}
		if step.level == "" && log.Len() > 0 || step.level != "" && (strings.Count(log.String(), "\n") != 1 || !strings.Contains(log.String(), `"level":"`+step.level+`"`)) {
			t.Errorf("logged %q, want one line of level %q", log.String(), step.level)
		}
	}
}
