package relay

import (
	"maps"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/rs/zerolog"
	"tailscale.com/tstime/mono"
	"tailscale.com/types/key"
)

// sessions is the set of open sessions.
type sessions struct {
	log    zerolog.Logger
	teller *teller // nil: refused clients are closed
	places *places // nil in tests
	nodeLimits

	refusedFirst atomic.Int64 // connections ended for their first frame
	droppedLarge atomic.Int64 // packets dropped for the backlog of their receiver

	mu      sync.Mutex
	open    map[*session]bool // guarded by mu
	refused bool              // whether new sessions are closed; guarded by mu
	notice  notice            // text for every client; guarded by mu
}

// newSessions returns an empty set.
func newSessions(log zerolog.Logger) *sessions {
	return &sessions{log: log, open: make(map[*session]bool), nodeLimits: nodeLimits{nodes: make(map[key.NodePublic]*limitedNode)}}
}

// handler wraps next, so that its hijacked connections are sessions.
func (all *sessions) handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(hijacker{w, r, all}, r)
	})
}

// add keeps s until it is closed. After refuse it closes s.
func (all *sessions) add(s *session) {
	all.mu.Lock()
	all.open[s] = true
	refused := all.refused
	all.mu.Unlock()
	if refused {
		_ = s.Close()
	}
	all.places.touch(s.below)
}

// greeted is called once a client has sent its key.
func (all *sessions) greeted(s *session) { all.places.touch(s.below) }

// remove forgets s, and logs its end the first time.
func (all *sessions) remove(s *session) {
	node, end := s.state()
	all.mu.Lock()
	open := all.open[s]
	delete(all.open, s)
	all.unlimit(s, node)
	all.mu.Unlock()
	if !open {
		return
	}
	if e := all.log.Debug(); e.Enabled() {
		e.Stringer("client", s.client).Str("node", node.ShortString()).Dur("connected", mono.Since(s.started)).AnErr("end", end).Msg("client disconnected")
	}
}

// admitted is called once for each session whose node derpserver has admitted, before
// its first frame after the server key is sent. It holds s.writeMu, and must not wait.
func (all *sessions) admitted(s *session) {
	all.places.admitted(s.below)
	all.limit(s)
}

// refuse closes all later sessions: [sessions.add] closes them.
func (all *sessions) refuse() {
	all.mu.Lock()
	defer all.mu.Unlock()
	all.refused = true
}

// closeAll closes the open sessions.
func (all *sessions) closeAll() {
	all.mu.Lock()
	open := slices.Collect(maps.Keys(all.open))
	all.mu.Unlock()
	for _, s := range open {
		_ = s.close()
	}
}
