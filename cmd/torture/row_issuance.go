//go:build linux

package main

import (
	"context"
	"io"
	"net/http"
	"time"

	"golang.org/x/sys/unix"

	"derpd/internal/testrelay"
)

func init() {
	register(row{
		name: "sigterm-issuance", short: true, light: true, run: stopIssuance,
		attack: "SIGTERM while the authority does not answer: at the first question, and at the order",
	})
}

const (
	endsWithin   = 2 * time.Second // after SIGTERM
	issuedWithin = 15 * time.Second
	mostOrders   = 2 // one that was given up, and one that was finished
)

func stopIssuance(ctx context.Context, l *lab) ([]measured, error) {
	const httpPort = 80 // of this row's namespace
	ca, env, err := l.authority(0, httpPort)
	if err != nil {
		return nil, err
	}
	s, err := l.subject("data", env...)
	if err != nil {
		return nil, err
	}
	// The authority answers nothing yet.
	first, err := s.stopDuring(ctx, ca.Asked)
	if err != nil {
		return nil, err
	}
	// It takes orders, and answers none.
	ordered := make(chan struct{}, 100)
	hang := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // the end of the connection is seen only after it
		ordered <- struct{}{}
		<-r.Context().Done()
	})
	ca.Refuse.Store(&hang)
	if err := ca.Serve(httpPort, 443); err != nil {
		return nil, err
	}
	second, err := s.stopDuring(ctx, ordered)
	if err != nil {
		return nil, err
	}
	ca.Refuse.Store(nil)
	r, ready, startErr := s.start(ctx)
	seen, shownErr := r.shown(ctx)
	certified := startErr == nil && shownErr == nil && seen.leaf.VerifyHostname(testrelay.Hostname) == nil
	lines := []measured{
		l.timely(promise("SIGTERM ends the process within "+endsWithin.String(), first < endsWithin && second < endsWithin, "%s, %s", millis(first), millis(second))),
		l.timely(promise("the next start is ready with a certificate within "+issuedWithin.String(), certified && ready < issuedWithin, "%s", timeOr(ready, startErr))),
		promise("no order is repeated needlessly", ca.Orders.Load() <= mostOrders, "%d orders", ca.Orders.Load()),
	}
	r.Stop()
	r, _, startErr = s.start(ctx)
	again, shownErr := r.shown(ctx)
	same := startErr == nil && shownErr == nil && certified && again.leaf.Equal(seen.leaf) && again.key == seen.key
	return append(lines, promise("the start after it keeps the certificate", same && ca.Orders.Load() <= mostOrders, "%d orders", ca.Orders.Load())), nil
}

// stopDuring starts a process, sends SIGTERM after an event, and returns how long the
// process takes to end.
func (s *subject) stopDuring(ctx context.Context, event <-chan struct{}) (time.Duration, error) {
	r, err := s.launch(ctx)
	if err != nil {
		return 0, err
	}
	select {
	case <-event:
	case <-r.Ended:
	case <-time.After(subjectWithin):
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	return r.terminate(), nil
}

// terminate sends SIGTERM, and returns how long the process takes to end.
func (r life) terminate() time.Duration {
	begun := time.Now()
	_ = unix.Kill(r.PID, unix.SIGTERM)
	select {
	case <-r.Ended:
	case <-time.After(subjectWithin):
		r.kill()
	}
	return time.Since(begun)
}
