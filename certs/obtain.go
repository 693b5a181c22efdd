package certs

import (
	"context"
	"errors"
	"io/fs"
	"time"

	"github.com/caddyserver/certmagic"
)

const (
	// firstPause and longestPause are the shortest and the longest pause
	// between two attempts. Each pause is twice the one before.
	firstPause   = time.Second
	longestPause = time.Minute

	// refusedPause is the pause after a refusal that certmagic does not retry.
	refusedPause = time.Hour

	// stopWithin limits the wait for certmagic when the relay stops.
	stopWithin = 300 * time.Millisecond
)

// obtain loads the stored certificate of name, or obtains a new one. It returns true
// when there is a certificate, and false when ctx ends first.
//
// obtain retries after two errors that certmagic does not retry: an unreachable
// authority, and an unwritable directory. A machine that has just booted may have no
// network yet.
func (a *ACME) obtain(ctx context.Context, config *certmagic.Config, name string) bool {
	return a.retry(ctx, name, func() error { return a.loadOrObtain(ctx, config, name) })
}

// retry calls attempt until attempt succeeds. It returns false when ctx ends first.
func (a *ACME) retry(ctx context.Context, name string, attempt func() error) bool {
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		err := attempt()
		if ctx.Err() != nil {
			return false
		}
		if err == nil {
			a.faults.clear(name)
			return true
		}
		wait := pause
		_, final := errors.AsType[certmagic.ErrNoRetry](err)
		if final {
			wait = refusedPause
		}
		// onEvent has recorded a final refusal, and onWrite a full disk.
		if !final && !a.faults.has(storageFault) {
			a.faults.set(name, explain(name, err))
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

// loadOrObtain is one attempt of obtain.
func (a *ACME) loadOrObtain(ctx context.Context, config *certmagic.Config, name string) error {
	_, err := config.CacheManagedCertificate(ctx, name)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, ok := errors.AsType[damagedError](err); ok {
		a.config.Log.Warn().Err(err).Str("name", name).Msg("stored certificate is damaged; obtaining another")
	}
	if err := a.reach(ctx); err != nil {
		return err
	}
	if err := config.ObtainCertAsync(ctx, name); err != nil {
		return err
	}
	_, err = config.CacheManagedCertificate(ctx, name)
	return err
}

// waitToStop calls halt and waits for its return, at most for stopWithin. halt may
// wait for an authority that does not answer. The relay's stop must not wait so long.
func waitToStop(halt func()) {
	stopped := make(chan struct{})
	go func() {
		halt()
		close(stopped)
	}()
	timeout := time.NewTimer(stopWithin)
	defer timeout.Stop()
	select {
	case <-stopped:
	case <-timeout.C:
	}
}
