// Package filewatch detects changed files, so that a program can read them again
// without a restart. It reads the files every two seconds by default. File system events
// would be faster, but network mounts and some bind mounts deliver none.
package filewatch

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"time"

	"derpd/internal/filekind"
)

// interval is the default time between two readings of the files.
const interval = 2 * time.Second

// Config names the files and the function to call.
type Config struct {
	Paths []string

	// Changed is called from Run's goroutine after each change, and once soon
	// after the start. The files may have changed since the caller read them.
	Changed func()

	// Interval is the time between two readings; 0: two seconds.
	Interval time.Duration

	// Seen returns the fingerprint of the caller's last reading; nil if the caller
	// reads the files in Changed alone. Changed is then called if the files differ
	// from it.
	Seen func() Fingerprint
}

// Run calls Changed until ctx ends. A change counts once two consecutive readings
// agree, because a file may be half written, or a certificate newer than its key.
func Run(ctx context.Context, c Config) error {
	ticker := time.NewTicker(cmp.Or(c.Interval, interval))
	defer ticker.Stop()
	var reported Fingerprint // at the last call of Changed
	last := Read(c.Paths)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		now := Read(c.Paths)
		if c.Seen != nil {
			reported = c.Seen()
		}
		if now == last && now != reported {
			reported = now
			c.Changed()
		}
		last = now
	}
}

// Fingerprint is a hash of the files' content. Time stamps are not enough: some
// file systems store whole seconds, and a replaced link may lead to an older file.
type Fingerprint [sha256.Size]byte

// Read returns the fingerprint of the files. It uses the error in place of the
// content of an unreadable file.
func Read(paths []string) Fingerprint {
	h := sha256.New()
	for _, path := range paths {
		data, err := filekind.Regular(path, filekind.MaxSize)
		// With the length, bytes that move from one file to the next change the
		// hash.
		_, _ = fmt.Fprintf(h, "%d %v\n", len(data), err)
		_, _ = h.Write(data)
	}
	return Fingerprint(h.Sum(nil))
}
