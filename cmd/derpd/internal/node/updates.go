package node

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"derpd/healthz"
	"derpd/internal/release"
)

// updates asks from time to time whether a newer release is out. Health and metrics
// have the last answer. A failure never makes the relay not ready.
type updates struct {
	ask   func(context.Context) (release.Answer, error)
	every time.Duration
	log   zerolog.Logger

	mu     sync.Mutex
	answer release.Answer // last one; guarded by mu
	asOf   time.Time      // of answer, zero before the first one; guarded by mu
	logged []string       // newer releases; guarded by mu
	err    error          // of the last question; guarded by mu
}

// run asks until ctx ends. The first question comes within a tenth of the interval, and
// each later interval is up to a tenth shorter or longer. So relays that were started
// together do not ask together.
func (u *updates) run(ctx context.Context) error {
	wait := rand.N(u.every / 10)
	for {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		answer, err := u.ask(ctx)
		u.keep(answer, err)
		wait = u.every - u.every/10 + rand.N(u.every/5)
	}
}

// keep stores the result of a question, and logs each newer release once.
func (u *updates) keep(answer release.Answer, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	// Without GitHub, a newer release of derpd on the same Tailscale cannot be seen.
	if err == nil && answer.GitHub != nil && !answer.Newer && u.answer.Newer {
		err = answer.GitHub
	}
	u.err = err
	if err != nil {
		return
	}
	if answer.Newer && !slices.Contains(u.logged, answer.Newest) {
		u.logged = append(u.logged, answer.Newest)
		u.log.Warn().Str("newest", answer.Newest).Str("fix", answer.Text).Msg("a newer release is out")
	}
	u.answer, u.asOf = answer, time.Now()
}

// last returns the last answer, when it was given, and the error of the last
// question.
func (u *updates) last() (answer release.Answer, asOf time.Time, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.answer, u.asOf, u.err
}

func (u *updates) check(context.Context) healthz.Result {
	answer, asOf, err := u.last()
	switch {
	case err != nil && asOf.IsZero():
		return healthz.Warnf("no answer yet: %v", err)
	case err != nil:
		return healthz.Warnf("%s, as of %s ago; no answer since: %v", answer.Text, age(asOf), err)
	case asOf.IsZero():
		return healthz.Okf("not asked yet")
	case answer.Newer:
		return healthz.Warnf("%s", answer.Text)
	}
	return healthz.Okf("%s, as of %s ago", answer.Text, age(asOf))
}
