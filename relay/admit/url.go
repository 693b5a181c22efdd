package admit

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
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

	// urlAtOnce is the number of idle connections to keep: one for each question that
	// may be under way.
	urlAtOnce = membersAtOnce + recheckAtOnce + QuestionsRunning

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
	strict  *net.Resolver // fails if the answer of one family is missing
	breaker *gobreaker.CircuitBreaker[struct{}]
	last    atomic.Pointer[error] // error of the last failed request
	open    atomic.Pointer[error] // why FailOpen admits every node now; nil if it does not
}

// errUnreachable means that no HTTP answer of any status was received.
var errUnreachable = errors.New("admission URL cannot be reached")

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
		strict:    &net.Resolver{PreferGo: true, StrictErrors: true},
		breaker: gobreaker.NewCircuitBreaker[struct{}](gobreaker.Settings{
			Timeout:      breakFor,
			ReadyToTrip:  func(counts gobreaker.Counts) bool { return counts.ConsecutiveFailures >= breakAfter },
			IsSuccessful: func(err error) bool { return err == nil || errors.Is(err, ErrRefused) },
			// With FailOpen, a URL that is down must be asked about each node.
			IsExcluded: func(err error) bool {
				return errors.Is(err, errAbandoned) || isExhausted(err) || c.FailOpen && isDown(err)
			},
		}),
	}
}

func (u *admissionURL) ask(ctx context.Context, node key.NodePublic, addr netip.Addr) (time.Time, error) {
	_, err := u.breaker.Execute(func() (struct{}, error) {
		err := u.post(ctx, node, addr)
		if err != nil && !errors.Is(err, ErrRefused) && abandoned(ctx) {
			err = fmt.Errorf("%w: %w", errAbandoned, err)
		}
		return struct{}{}, err
	})
	switch {
	case errors.Is(err, gobreaker.ErrOpenState), errors.Is(err, gobreaker.ErrTooManyRequests):
		if last := u.last.Load(); last != nil {
			err = fmt.Errorf("not asked for a moment after failures; the last one: %w", *last)
		}
		return time.Now(), err
	case errors.Is(err, errAbandoned):
		return time.Now(), err
	case err != nil && !errors.Is(err, ErrRefused):
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
	case isExhausted(err): // says nothing about the URL
		return false
	case !isDown(err):
		if u.open.Swap(nil) != nil {
			u.Log.Info().Str("url", redact.URL(u.Target)).Msg("DERP_VERIFY_CLIENT_URL_FAIL_OPEN admits nobody any longer: the admission URL can be reached, or does not answer in time")
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
	body, err := json.Marshal(tailcfg.DERPAdmitClientRequest{NodePublic: node, Source: addr})
	if err != nil {
		return err
	}
	var tried attempts
	req, err := http.NewRequestWithContext(tried.trace(ctx), http.MethodPost, u.Target, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	// net/http repeats the question on another connection if the server has just
	// closed the idle one. The empty header is not sent.
	req.Header["Idempotency-Key"] = nil
	res, err := u.client.Do(req)
	if err != nil {
		if !isExhausted(err) && !abandoned(ctx) {
			u.client.CloseIdleConnections() // the network may have lost them too
		}
		if u.FailOpen && isDown(err) {
			err = tried.confirm(ctx, u.strict, err)
		}
		return fmt.Errorf("%w: %w", errUnreachable, explainConnection(err))
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK {
		return explainStatus(res)
	}
	return parseAnswer(res.Body)
}
