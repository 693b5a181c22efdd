package admit

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"

	"derpd/internal/filekind"
	"derpd/internal/filewatch"
	"derpd/internal/redact"
)

// KeySet is a set of node keys, with the comment of each: the text after the # on the
// line of the key.
type KeySet map[key.NodePublic]string

// ParseKeys reads node keys ("nodekey:" and 64 hex digits, as `tailscale
// status --json` prints them), separated by white space or commas. A # starts a
// comment. All errors are returned together, with their lines.
func ParseKeys(text string) (KeySet, error) {
	keys := make(KeySet)
	var errs []error
	n := 0
	for line := range strings.Lines(text) {
		n++
		line, comment, _ := strings.Cut(line, "#")
		for _, field := range strings.FieldsFunc(line, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' || r == '\r' || r == '\n' }) {
			k, err := parseKey(field)
			if err != nil {
				errs = append(errs, fmt.Errorf("line %d: %w", n, err))
				continue
			}
			keys[k] = strings.TrimSpace(comment)
		}
	}
	if len(errs) == 0 && len(keys) == 0 {
		errs = append(errs, errors.New("holds no node key"))
	}
	return keys, errors.Join(errs...)
}

func parseKey(field string) (key.NodePublic, error) {
	if strings.HasPrefix(field, "privkey:") {
		return key.NodePublic{}, errors.New("want a public node key (nodekey:…), got a private key; remove it from here")
	}
	var k key.NodePublic
	if err := k.UnmarshalText([]byte(field)); err != nil || k.IsZero() {
		return key.NodePublic{}, fmt.Errorf("want nodekey: and 64 hex digits, got %q", redact.Value(field))
	}
	return k, nil
}

// Keys returns a source that admits the nodes of a fixed set.
func Keys(keys KeySet) Source {
	return Source{
		Name:  fmt.Sprintf("%d keys", len(keys)),
		Local: true,
		Ask: func(_ context.Context, node key.NodePublic, _ netip.Addr) (time.Time, error) {
			return time.Now(), keys.ask(node)
		},
		Describe: keys.describe,
	}
}

func (keys KeySet) describe(node key.NodePublic) (Description, bool) {
	comment, ok := keys[node]
	return Description{Comment: comment}, ok
}

func (keys KeySet) ask(node key.NodePublic) error {
	if _, ok := keys[node]; !ok {
		return ErrRefused
	}
	return nil
}

// LoadKeys reads a key file.
func LoadKeys(path string) (KeySet, error) {
	text, err := filekind.Read(path)
	if err != nil {
		return nil, fmt.Errorf("reading node keys: %w", err)
	}
	if err := filekind.Text(path, text); err != nil {
		return nil, fmt.Errorf("reading node keys: %w", err)
	}
	keys, err := ParseKeys(string(text))
	if err != nil {
		return nil, fmt.Errorf("reading node keys from %s: %w", path, err)
	}
	return keys, nil
}

// KeyFile returns a source that admits the nodes listed in a file. It reads the
// file again after each change. While the file is empty, broken or unreadable, the
// last good list stays in force, and the source reports the problem.
func KeyFile(path string, log zerolog.Logger) (Source, error) {
	keys, err := LoadKeys(path)
	if err != nil {
		return Source{}, err
	}
	f := &keyFile{path: path, log: log, keys: keys}
	return Source{Name: "keys " + path, Local: true, Ask: f.ask, Run: f.run, Reload: f.reloadNow, Problem: f.problem, Describe: f.describe}, nil
}

type keyFile struct {
	path string
	log  zerolog.Logger

	reloading sync.Mutex // held while the file is read and the list replaced

	mu   sync.RWMutex
	keys KeySet // the last good list; guarded by mu
	err  error  // error of the file's present content; nil if it is in force; guarded by mu
}

// ask returns the present time as the age, because an unchanged file stays valid.
func (f *keyFile) ask(_ context.Context, node key.NodePublic, _ netip.Addr) (time.Time, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return time.Now(), f.keys.ask(node)
}

// describe implements [Source].
func (f *keyFile) describe(node key.NodePublic) (Description, bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.keys.describe(node)
}

// problem implements [Source].
func (f *keyFile) problem() error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.err != nil {
		return fmt.Errorf("the last good list of %d keys stays in force: %w", len(f.keys), f.err)
	}
	return nil
}

func (f *keyFile) run(ctx context.Context, changed func()) error {
	return filewatch.Run(ctx, filewatch.Config{
		Paths: []string{f.path},
		Changed: func() {
			if f.reload() {
				changed()
			}
		},
	})
}

// reloadNow implements [Source].
func (f *keyFile) reloadNow() (file string, changed bool) { return f.path, f.reload() }

// reload reads the file, and reports whether the list in force changed.
func (f *keyFile) reload() bool {
	f.reloading.Lock()
	defer f.reloading.Unlock()
	keys, err := LoadKeys(f.path)
	f.mu.Lock()
	old, before := f.keys, f.err
	f.err = err
	if err == nil {
		f.keys = keys // the comments may be new
	}
	f.mu.Unlock() // the log may wait, and the relay describes nodes while it holds its locks
	if err != nil {
		if before == nil || before.Error() != err.Error() {
			f.log.Error().Err(err).Int("keys", len(old)).Msg("node keys not read; the last good list stays in force")
		}
		return false
	}
	same := maps.EqualFunc(keys, old, func(_, _ string) bool { return true })
	if before == nil && same {
		return false
	}
	f.log.Info().Str("file", f.path).Int("keys", len(keys)).Msg("node keys read again")
	return !same
}
