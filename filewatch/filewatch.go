// Package filewatch tells when files may have changed, so that what was read
// from them is read again without a restart.
package filewatch

import (
	"context"
	"errors"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/rs/zerolog"
)

const (
	// settle is how long files must be left alone before they are looked at:
	// editors and renewal tools write in several steps, and certificate and
	// key one after the other.
	settle = 500 * time.Millisecond

	// usualPoll is how often they are looked at without an event, for mounts that
	// tell of no change, such as NFS.
	usualPoll = 30 * time.Second
)

// Config says what to watch.
type Config struct {
	Paths []string
	Poll  time.Duration // between looks without an event; 0 for every half minute

	// Look is called from Run's goroutine whenever the files may have
	// changed: once at the start, for what changed before the watch began,
	// and often in vain. It decides itself whether they did.
	Look func()

	Log zerolog.Logger
}

// Run calls Look until ctx ends. It watches the directories of the files, since
// that is where a link is swapped or a file renamed. Where nothing can be
// watched the files are polled all the same.
func Run(ctx context.Context, c Config) error {
	if c.Poll == 0 {
		c.Poll = usualPoll
	}
	events := make(chan fsnotify.Event) // never, if nothing can be watched
	failures := make(chan error)
	watcher, err := fsnotify.NewWatcher()
	if err == nil {
		defer func() { _ = watcher.Close() }()
		for _, path := range c.Paths {
			err = errors.Join(err, watcher.Add(filepath.Dir(path)))
		}
		events, failures = watcher.Events, watcher.Errors
	}
	if err != nil {
		c.Log.Warn().Err(err).Strs("files", c.Paths).Dur("poll_ms", c.Poll).Msg("files cannot be watched, they are only polled")
	}
	poll := time.NewTicker(c.Poll)
	defer poll.Stop()
	quiet := time.NewTimer(0)
	defer quiet.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-events:
			quiet.Reset(settle)
		case err := <-failures:
			c.Log.Debug().Err(err).Msg("watching files")
		case <-quiet.C:
			c.Look()
		case <-poll.C:
			c.Look()
		}
	}
}
