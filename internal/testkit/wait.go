package testkit

import (
	"context"
	"errors"
	"testing"
	"time"
)

// Patience is the longest wait of a test for an event that must happen. A test that
// passes never waits so long, so the value only has to suit the slowest machine.
const Patience = time.Minute

// pollEvery is the interval between two attempts. It is long enough for attempts
// that start a program, and adds little to a test that waits a few times.
const pollEvery = 50 * time.Millisecond

// errNotYet is the error of a condition that does not hold.
var errNotYet = errors.New("not yet")

// Retry calls attempt until it returns nil or ctx ends, and returns the last
// error of attempt. Attempts never overlap. Retry is for callers without a
// testing.TB, such as commands of testscript; tests call [Wait].
func Retry(ctx context.Context, attempt func(context.Context) error) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		err := attempt(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

// Wait calls attempt until it returns nil. After [Patience] the test fails with
// the last error.
func Wait(t testing.TB, what string, attempt func(context.Context) error) {
	t.Helper()
	Within(t, Patience, what, attempt)
}

// Within is [Wait] with another limit. It is for events that may take longer than
// [Patience], or must take less.
func Within(t testing.TB, limit time.Duration, what string, attempt func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if err := Retry(ctx, attempt); err != nil {
		t.Fatalf("waited %v for %s: %v", limit, what, err)
	}
}

// Until waits until holds returns true. After [Patience] the test fails.
// [Wait] is the better choice where a failure has an error to show.
func Until(t testing.TB, what string, holds func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	if err := Retry(ctx, func(context.Context) error {
		if holds() {
			return nil
		}
		return errNotYet
	}); err != nil {
		t.Fatalf("not within %v: %s", Patience, what)
	}
}

// Receive returns the next value of a channel, or the zero value of a channel
// that is closed. After [Patience] the test fails.
func Receive[T any](t testing.TB, what string, from <-chan T) T {
	t.Helper()
	timeout := time.NewTimer(Patience)
	defer timeout.Stop()
	select {
	case value := <-from:
		return value
	case <-timeout.C:
		t.Fatalf("not within %v: %s", Patience, what)
	}
	var none T
	return none
}
