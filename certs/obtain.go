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
	// between two attempts. Each pause is twice the last one.
	firstPause   = time.Second
	longestPause = time.Minute

	// refusedPause is the pause after a refusal that certmagic takes as final.
	refusedPause = time.Hour

	// stopWithin limits the wait for certmagic at the stop.
	stopWithin = 300 * time.Millisecond
)

// obtain loads the stored certificate of name, or obtains one. It reports
// whether there is a certificate, and false only after ctx has ended.
//
// obtain retries what certmagic does not retry: an authority that cannot be
// reached, and a directory that cannot be written to. A machine that has just
// booted may have no network yet.
func (a *ACME) obtain(ctx context.Context, config *certmagic.Config, name string) bool {
	return a.retry(ctx, name, func() error { return a.loadOrObtain(ctx, config, name) })
}

// retry calls attempt until it succeeds, and reports false when ctx ends first.
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
		// onEvent has reported a final refusal, and onWrite a full disk.
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

// waitToStop calls halt and waits for it, but no longer than stopWithin. halt may
// wait for an authority that does not answer, and must not delay the relay's stop.
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
