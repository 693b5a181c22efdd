package nodelimits

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"

	"derpd/internal/filekind"
	"derpd/internal/filewatch"
	"derpd/relay"
	"derpd/relay/admit"
)

// watchEvery is the interval between two readings of the file. A change takes effect
// after two readings that agree, within a second.
const watchEvery = 400 * time.Millisecond

// Load reads a file of limits; see [Parse].
func Load(path string, defaults relay.NodeLimit) ([]Rule, error) {
	text, err := filekind.Read(path)
	if err != nil {
		return nil, fmt.Errorf("reading limits: %w", err)
	}
	if err := filekind.Text(path, text); err != nil {
		return nil, fmt.Errorf("reading limits: %w", err)
	}
	rules, err := Parse(string(text), defaults)
	if err != nil {
		return nil, fmt.Errorf("reading limits from %s: %w", path, err)
	}
	return rules, nil
}

// Config holds the settings of Limits.
type Config struct {
	Defaults relay.NodeLimit
	Path     string // file of limits, or empty

	// Describe returns what the sources of admission say about a node.
	Describe func(key.NodePublic) admit.Description

	// Changed is called after each change of the file. It may be nil.
	Changed func()

	Log zerolog.Logger
}

// Limits are the limits of all nodes. While the file is empty, broken or unreadable, its
// last good lines stay in force.
type Limits struct {
	config Config

	reloading sync.Mutex // held while the file is read and the rules replaced

	mu    sync.RWMutex
	rules []Rule // the last good lines; guarded by mu
	err   error  // error of the file's present content; nil if it is in force; guarded by mu

	failures atomic.Int64 // readings of a file that was not good
}

// New reads the file.
func New(c Config) (*Limits, error) {
	l := &Limits{config: c}
	if c.Path == "" {
		return l, nil
	}
	var err error
	l.rules, err = Load(c.Path, c.Defaults)
	return l, err
}

// Of returns the limit of a node, and the line that it is from: nil for the defaults.
func (l *Limits) Of(node key.NodePublic) (relay.NodeLimit, *Rule) {
	l.mu.RLock()
	rules := l.rules
	l.mu.RUnlock()
	if len(rules) == 0 {
		return l.config.Defaults, nil
	}
	description := l.config.Describe(node)
	i := slices.IndexFunc(rules, func(r Rule) bool { return r.fits(node, description) })
	if i < 0 {
		return l.config.Defaults, nil
	}
	return rules[i].Limit, &rules[i]
}

// Explain prints the limit of a node and where it is from.
func (l *Limits) Explain(node key.NodePublic) string {
	limit, rule := l.Of(node)
	if rule == nil {
		return Describe(limit) + " (DERP_CLIENT_RATE, DERP_MAX_PER_NODE)"
	}
	return fmt.Sprintf("%s (%s, %s:%d)", Describe(limit), rule.Who, l.config.Path, rule.Line)
}

// Lines returns the number of lines in force.
func (l *Limits) Lines() int {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return len(l.rules)
}

// Problem returns why the file as it is now is not in force, or nil.
func (l *Limits) Problem() error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.err != nil {
		return fmt.Errorf("the last good %d lines stay in force: %w", len(l.rules), l.err)
	}
	return nil
}

// Failures returns how often a file was read that is not in force.
func (l *Limits) Failures() int64 { return l.failures.Load() }

// Run reads the file again after each change, until ctx ends.
func (l *Limits) Run(ctx context.Context) error {
	return filewatch.Run(ctx, filewatch.Config{Paths: []string{l.config.Path}, Interval: watchEvery, Changed: l.Reload})
}

// Reload reads the file again.
func (l *Limits) Reload() {
	l.reloading.Lock()
	defer l.reloading.Unlock()
	rules, err := Load(l.config.Path, l.config.Defaults)
	l.mu.Lock()
	before, same := l.err, slices.Equal(rules, l.rules)
	l.err = err
	if err == nil {
		l.rules = rules
	}
	l.mu.Unlock()
	switch {
	case err != nil:
		l.failures.Add(1)
		if before == nil || before.Error() != err.Error() {
			l.config.Log.Error().Err(err).Str("variable", "DERP_LIMITS_FILE").Int("lines", l.Lines()).Msg("limits not read; the last good lines stay in force")
		}
		return
	case before == nil && same:
		return
	}
	l.config.Log.Info().Str("file", l.config.Path).Int("lines", len(rules)).Msg("limits read again")
	if l.config.Changed != nil {
		l.config.Changed()
	}
}
