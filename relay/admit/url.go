package admit

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"github.com/sony/gobreaker/v2"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/internal/redact"
)

const (
	// maxAnswer limits the size of an admission answer, in bytes.
	maxAnswer = 4 << 10

	// urlTimeout limits one question to an admission URL, including the wait
	// for a slot.
	urlTimeout = 3 * time.Second

	// urlEnough is the time after which a question without an answer is a failure of
	// the server. A question that waited for its slot may have less.
	urlEnough = urlTimeout - 500*time.Millisecond

	// urlAtOnce limits the concurrent questions to one admission URL. After a
	// restart of the relay, all clients connect at the same time.
	urlAtOnce = 32

	// After breakAfter consecutive failures, the relay sends no requests for
	// breakFor, and then a single one. Otherwise every client would wait for a
	// timeout, and the requests could keep the server down.
	breakAfter = 5
	breakFor   = 2 * time.Second
)

// URLConfig holds the settings of one admission URL.
type URLConfig struct {
	Target string

	// FailOpen admits every node while the URL cannot be reached, like
	// derper's --verify-client-url-fail-open.
	FailOpen bool

	Roots *x509.CertPool // roots of an https URL; nil for the system's

	Log zerolog.Logger
}

// admissionURL asks one admission URL.
type admissionURL struct {
	URLConfig
	client  *http.Client
	slots   chan struct{} // holds one element for each running question
	breaker *gobreaker.CircuitBreaker[struct{}]
	last    atomic.Pointer[error] // error of the last failed request
	open    atomic.Pointer[error] // why FailOpen admits every node now; nil if it does not
}

// errUnreachable means that no HTTP answer of any status was received.
var errUnreachable = errors.New("admission URL cannot be reached")

// errBusy means that the relay did not ask, because it waits for the answers to its
// other questions. The source has not failed.
var errBusy = errors.New("too many questions at the same time")

// URL returns a source that asks an admission URL. The protocol is that of
// derper's --verify-client-url and Headscale's /verify: a POST of
// tailcfg.DERPAdmitClientRequest, answered with tailcfg.DERPAdmitClientResponse.
func URL(c URLConfig) Source {
	u := newAdmissionURL(c)
	return Source{Name: "url " + redact.URL(c.Target), Ask: u.ask, Problem: u.problem}
}

func newAdmissionURL(c URLConfig) *admissionURL {
	t := transport(c.Roots)
	t.MaxIdleConnsPerHost = urlAtOnce
	return &admissionURL{
		URLConfig: c,
		client:    &http.Client{Transport: t, CheckRedirect: checkRedirect},
		slots:     make(chan struct{}, urlAtOnce),
		breaker: gobreaker.NewCircuitBreaker[struct{}](gobreaker.Settings{
			Timeout:      breakFor,
			ReadyToTrip:  func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= breakAfter },
			IsSuccessful: func(err error) bool { return err == nil || errors.Is(err, ErrRefused) },
			// Canceled, because another source has admitted the node first.
			IsExcluded: func(err error) bool { return errors.Is(err, context.Canceled) || errors.Is(err, errBusy) },
		}),
	}
}

func (u *admissionURL) ask(ctx context.Context, node key.NodePublic, addr netip.Addr) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, urlTimeout)
	defer cancel()
	_, err := u.breaker.Execute(func() (struct{}, error) {
		return struct{}{}, u.post(ctx, node, addr)
	})
	switch {
	case errors.Is(err, gobreaker.ErrOpenState), errors.Is(err, gobreaker.ErrTooManyRequests):
		if last := u.last.Load(); last != nil {
			err = fmt.Errorf("not asked for a moment after failures; the last one: %w", *last)
		}
	case err != nil && !errors.Is(err, ErrRefused) && !errors.Is(err, context.Canceled) && !errors.Is(err, errBusy):
		u.last.Store(&err)
	}
	if u.FailOpen && u.failsOpen(err) {
		return time.Time{}, nil
	}
	return time.Now(), err
}

// failsOpen reports whether FailOpen admits the node, and logs when it begins and ends
// to admit every node.
func (u *admissionURL) failsOpen(err error) bool {
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, errBusy): // not asked
		return errors.Is(err, errUnreachable)
	case !errors.Is(err, errUnreachable):
		if u.open.Swap(nil) != nil {
			u.Log.Info().Str("url", redact.URL(u.Target)).Msg("admission URL answers again")
		}
		return false
	}
	if u.open.Swap(&err) == nil {
		u.Log.Warn().Err(err).Str("url", redact.URL(u.Target)).Msg("anybody may connect, because DERP_VERIFY_CLIENT_URL_FAIL_OPEN is true")
	}
	return true
}

// problem implements [Source].Problem.
func (u *admissionURL) problem() error {
	if err := u.open.Load(); err != nil {
		return fmt.Errorf("anybody may connect, because DERP_VERIFY_CLIENT_URL_FAIL_OPEN is true: %w", *err)
	}
	return nil
}

func (u *admissionURL) post(ctx context.Context, node key.NodePublic, addr netip.Addr) error {
	select {
	case u.slots <- struct{}{}:
		defer func() { <-u.slots }()
	case <-ctx.Done():
		return fmt.Errorf("%w: waiting for %d others: %w", errBusy, urlAtOnce, ctx.Err())
	}
	body, err := json.Marshal(tailcfg.DERPAdmitClientRequest{NodePublic: node, Source: addr})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.Target, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	// net/http repeats the question on another connection if the server has just
	// closed the idle one. The empty header is not sent.
	req.Header["Idempotency-Key"] = nil
	began := time.Now()
	res, err := u.client.Do(req)
	if errors.Is(err, context.DeadlineExceeded) && time.Since(began) < urlEnough {
		return fmt.Errorf("%w: no answer in the %s that were left: %w", errBusy, time.Since(began).Round(time.Millisecond), context.DeadlineExceeded)
	}
	if err != nil {
		u.client.CloseIdleConnections() // the network may have lost them too
		return fmt.Errorf("%w: %w", errUnreachable, explainConnection(err))
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK {
		return explainStatus(res)
	}
	return parseAnswer(res.Body)
}
