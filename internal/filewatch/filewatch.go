// Package filewatch notices that files have changed, so that a program can
// read them again without a restart. It reads the files every two seconds:
// file system events would be faster, but network mounts and some bind mounts
// deliver none.
package filewatch

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"time"
)

// interval is the time between two readings of the files.
const interval = 2 * time.Second

// Config names the files and the function to call.
type Config struct {
	Paths []string

	// Look is called from Run's goroutine after each change, and once soon
	// after the start: the files may have changed since the caller read them.
	Look func()
}

// Run calls Look until ctx ends. A change counts once two consecutive readings
// agree: a certificate and its key are written one after the other, and a file
// may be half written.
func Run(ctx context.Context, c Config) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	var looked fingerprint // what the last Look was called for
	last := read(c.Paths)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		now := read(c.Paths)
		if now == last && now != looked {
			looked = now
			c.Look()
		}
		last = now
	}
}

// fingerprint is a hash of the files' content. Time stamps would not do: some
// file systems store whole seconds, and a swapped link may lead to an older
// file.
type fingerprint [sha256.Size]byte

// read returns the fingerprint of the files. For a file that cannot be read,
// the error stands for the content.
func read(paths []string) fingerprint {
	h := sha256.New()
	for _, path := range paths {
		data, err := os.ReadFile(path)
		// The length comes first, so that bytes cannot move from one file
		// to the next unnoticed.
		_, _ = fmt.Fprintf(h, "%d %v\n", len(data), err)
		_, _ = h.Write(data)
	}
	return fingerprint(h.Sum(nil))
}
