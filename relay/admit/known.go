package admit

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"os"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/atomicfile"
	"tailscale.com/types/key"
)

const (
	// saveSoon is how long changes are gathered before they are written.
	saveSoon = time.Second

	// saveLate is how often a yes that only repeats an older one is written:
	// the time in the file is behind by at most this.
	saveLate = 10 * time.Minute
)

// known remembers whom a source admitted, and when: they stay welcome for the
// grace while a source cannot tell. It outlives restarts in a file.
type known struct {
	path  string
	grace time.Duration
	log   zerolog.Logger
	dirty chan struct{} // holds one when nodes came or went

	mu      sync.Mutex
	nodes   map[key.NodePublic]time.Time // of the last yes; guarded by mu
	unsaved bool                         // guarded by mu
}

// loadKnown reads the file. One that cannot be read costs the grace and nothing
// else, so it does not stand in the way of the start.
func loadKnown(path string, grace time.Duration, log zerolog.Logger) *known {
	k := &known{path: path, grace: grace, log: log, dirty: make(chan struct{}, 1), nodes: make(map[key.NodePublic]time.Time)}
	data, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(data, &k.nodes)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn().Err(err).Str("file", path).Msg("admitted nodes not read: none is known while a source cannot tell")
	}
	if err != nil || k.nodes == nil { // null is JSON too
		k.nodes = make(map[key.NodePublic]time.Time)
	}
	k.prune(time.Now())
	return k
}

// prune drops who is no longer welcome, and times that are not in the past: the
// clock was wrong then or is wrong now, and a grace must end. mu must be held
// once the gate is in use.
func (k *known) prune(now time.Time) {
	maps.DeleteFunc(k.nodes, func(_ key.NodePublic, at time.Time) bool {
		return at.After(now) || now.Sub(at) > k.grace
	})
}

// admitted remembers a yes as of a time.
func (k *known) admitted(node key.NodePublic, asOf time.Time) {
	if asOf.IsZero() || k.grace == 0 {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	before, ok := k.nodes[node]
	if ok && !asOf.After(before) {
		return
	}
	k.nodes[node] = asOf
	k.unsaved = true
	if !ok {
		k.wake()
	}
}

// forget is for a node that all sources refuse.
func (k *known) forget(node key.NodePublic) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.nodes[node]; ok {
		delete(k.nodes, node)
		k.unsaved = true
		k.wake()
	}
}

func (k *known) wake() {
	select {
	case k.dirty <- struct{}{}:
	default:
	}
}

// welcome reports whether a source admitted the node within the grace.
func (k *known) welcome(node key.NodePublic) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	at, ok := k.nodes[node]
	return ok && time.Since(at) <= k.grace
}

// run writes the file until ctx ends, and then once more.
func (k *known) run(ctx context.Context) {
	late := time.NewTicker(saveLate)
	defer late.Stop()
	var soon <-chan time.Time
	failed := false
	save := func() {
		soon = nil
		err := k.save()
		if err != nil && !failed {
			k.log.Warn().Err(err).Msg("admitted nodes not written: after a restart none is known while a source cannot tell")
		}
		failed = err != nil
	}
	for {
		select {
		case <-ctx.Done():
			save()
			return
		case <-k.dirty:
			if soon == nil {
				soon = time.After(saveSoon)
			}
		case <-soon:
			save()
		case <-late.C:
			save()
		}
	}
}

func (k *known) save() error {
	k.mu.Lock()
	k.prune(time.Now())
	if !k.unsaved {
		k.mu.Unlock()
		return nil
	}
	nodes := maps.Clone(k.nodes)
	k.unsaved = false
	k.mu.Unlock()

	data, err := json.Marshal(nodes)
	if err == nil {
		err = atomicfile.WriteFile(k.path, append(data, '\n'), 0o600)
	}
	if err != nil {
		k.mu.Lock()
		k.unsaved = true // try again
		k.mu.Unlock()
	}
	return err
}
