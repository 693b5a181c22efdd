package admit

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/atomicfile"
	"tailscale.com/types/key"

	"derpd/internal/filekind"
)

const (
	// saveSoon is the delay between a change and its writing, so that many
	// changes are written together.
	saveSoon = time.Second

	// saveLate is the longest delay of a write when only times have changed.
	saveLate = 10 * time.Minute

	// knownFor is the time for which a node is a member after its last admission. The
	// grace may be shorter.
	knownFor = 30 * 24 * time.Hour

	// maxNodes limits the remembered nodes. A source may admit any key. A full memory
	// loses one node in ten: those whose last admission is the oldest.
	maxNodes = 100_000

	// maxMemory limits the file, in bytes. A node takes about 115.
	maxMemory = 64 << 20
)

// memory stores when a source last admitted each node. While a source is
// unavailable, these nodes stay admitted for the grace. For knownFor, the sources are
// asked about them before strangers. A file keeps them over restarts. A stranger is no
// element: only a source that knows a node adds it, and fail-open of an admission URL
// does not.
type memory struct {
	path  string
	grace time.Duration
	limit int // on nodes
	log   zerolog.Logger
	dirty chan struct{} // filled when a node is added or removed

	loaded time.Time // when the file was read
	latest time.Time // the latest time in the file then, at most loaded if the clock was right

	mu      sync.Mutex
	nodes   map[key.NodePublic]time.Time // time of the last admission; guarded by mu
	unsaved bool                         // guarded by mu
}

// loadMemory reads the file. An unreadable file does not prevent the start, and
// only the grace of earlier nodes is lost.
func loadMemory(path string, grace time.Duration, log zerolog.Logger) *memory {
	m := &memory{path: path, grace: grace, limit: maxNodes, log: log, dirty: make(chan struct{}, 1)}
	m.load()
	return m
}

func (m *memory) load() {
	data, err := filekind.Regular(m.path, maxMemory)
	if err == nil {
		err = json.Unmarshal(data, &m.nodes)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.log.Warn().Err(err).Str("file", m.path).Msg("admitted nodes not read: no node has a grace until a source admits it again")
	}
	if err != nil || m.nodes == nil { // null is JSON too
		m.nodes = make(map[key.NodePublic]time.Time)
	}
	m.loaded = time.Now()
	for _, at := range m.nodes {
		if at.After(m.latest) {
			m.latest = at
		}
	}
	delete(m.nodes, saved)
	m.prune()
	m.shrink()
}

// saved is no node. Its element in the file is the time of saving.
var saved key.NodePublic

// clock returns a time of the system's clock by the clock of the memory. A computer
// without a battery starts with a clock that is behind. Until it is set, the clock of the
// memory continues from the latest time in the file. So the grace neither ends at such
// a start nor begins again.
func (m *memory) clock(at time.Time) time.Time {
	now := time.Now()
	if behind := m.latest.Add(now.Sub(m.loaded)).Sub(now.Round(0)); behind > 0 {
		return at.Round(0).Add(behind)
	}
	return at
}

// prune drops expired nodes, and times in the future, because a grace must end. mu must
// be held once the gate is in use.
func (m *memory) prune() {
	now := m.clock(time.Now())
	maps.DeleteFunc(m.nodes, func(_ key.NodePublic, at time.Time) bool {
		return at.After(now) || now.Sub(at) > max(m.grace, knownFor)
	})
}

// shrink makes room for another node. mu must be held once the gate is in use.
func (m *memory) shrink() {
	if len(m.nodes) < m.limit {
		return
	}
	oldest := slices.SortedFunc(maps.Keys(m.nodes), func(a, b key.NodePublic) int { return m.nodes[a].Compare(m.nodes[b]) })
	for _, node := range oldest[:len(oldest)-m.limit*9/10] {
		delete(m.nodes, node)
	}
}

// remember stores that a source admitted the node, as of a time.
func (m *memory) remember(node key.NodePublic, asOf time.Time) {
	if asOf.IsZero() {
		return
	}
	asOf = m.clock(asOf)
	m.mu.Lock()
	defer m.mu.Unlock()
	before, ok := m.nodes[node]
	if ok && !asOf.After(before) {
		return
	}
	if !ok {
		m.shrink()
		m.wake()
	}
	m.nodes[node] = asOf
	m.unsaved = true
}

// forget removes a node that every source refuses.
func (m *memory) forget(node key.NodePublic) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.nodes[node]; ok {
		delete(m.nodes, node)
		m.unsaved = true
		m.wake()
	}
}

func (m *memory) wake() {
	select {
	case m.dirty <- struct{}{}:
	default:
	}
}

// holds reports whether a source admitted the node within the grace.
func (m *memory) holds(node key.NodePublic) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	at, ok := m.nodes[node]
	return ok && m.grace > 0 && m.clock(time.Now()).Sub(at) <= m.grace
}

// knows reports whether a source admitted the node within knownFor, or the grace.
func (m *memory) knows(node key.NodePublic) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.nodes[node]
	return ok
}

// run writes the file until ctx ends, and then once more.
func (m *memory) run(ctx context.Context) {
	late := time.NewTicker(saveLate)
	defer late.Stop()
	var soon <-chan time.Time
	failed := false
	save := func() {
		soon = nil
		err := m.save()
		if err != nil && !failed {
			m.log.Warn().Err(err).Msg("admitted nodes not written: after a restart no node has a grace until a source admits it again")
		}
		failed = err != nil
	}
	for {
		select {
		case <-ctx.Done():
			save()
			return
		case <-m.dirty:
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

func (m *memory) save() error {
	m.mu.Lock()
	m.prune()
	now := m.clock(time.Now())
	if behind := now.After(time.Now()); !m.unsaved && !behind {
		m.mu.Unlock()
		return nil
	}
	nodes := maps.Clone(m.nodes)
	nodes[saved] = now
	m.unsaved = false
	m.mu.Unlock()

	data, err := json.Marshal(nodes)
	if err == nil {
		err = atomicfile.WriteFile(m.path, append(data, '\n'), 0o600)
	}
	if err != nil {
		m.mu.Lock()
		m.unsaved = true // retried at the next save
		m.mu.Unlock()
	}
	return err
}
