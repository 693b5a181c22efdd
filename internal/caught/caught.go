// Package caught records panics that end one connection or one question, and not the
// process. A caller recovers only where no lock stays held and no state half changed.
package caught

import (
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// logEvery is the shortest time between two log lines of one kind. Strangers may cause
// the same panic as often as they like.
const logEvery = time.Minute

// seen are the panics of this process. A kind is a constant or names a source of the
// configuration, so strangers cannot add one.
var seen struct {
	mu     sync.Mutex
	count  uint64
	logged map[string]time.Time // time of the last log line, by kind
}

// Panic counts a recovered value, and logs it with the stack at error level. what
// names the work that ended. A deferred function calls Panic.
func Panic(log zerolog.Logger, what string, value any) {
	Record(log, what, fmt.Sprint(value), string(debug.Stack()))
}

// Record is Panic for a panic that a library has recovered.
func Record(log zerolog.Logger, what, value, stack string) {
	seen.mu.Lock()
	defer seen.mu.Unlock()
	seen.count++
	if last, ok := seen.logged[what]; ok && time.Since(last) < logEvery {
		return
	}
	if seen.logged == nil {
		seen.logged = make(map[string]time.Time)
	}
	seen.logged[what] = time.Now()
	log.Error().Str("in", what).Str("panic", value).Str("stack", stack).
		Msg("a bug of derpd ended one connection or question; please report it with this line")
}

// Count is the number of panics since the start.
func Count() uint64 {
	seen.mu.Lock()
	defer seen.mu.Unlock()
	return seen.count
}
