package admit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

const (
	// maxAnswer bounds an admission answer, in bytes.
	maxAnswer = 4 << 10

	// urlTimeout bounds one question to an admission URL, waiting for the
	// others included.
	urlTimeout = 3 * time.Second

	// urlAtOnce bounds the questions to one admission URL at the same time:
	// after a restart of the relay all clients come at once.
	urlAtOnce = 32

	// After breakAfter failures in a row an admission URL is left alone for
	// breakFor, and then asked one question: what is down must not cost every
	// client a timeout, nor be kept down by our questions.
	breakAfter = 5
	breakFor   = 2 * time.Second
)

// URLConfig is one admission URL.
type URLConfig struct {
	Target string

	// FailOpen admits everybody while the URL cannot be reached, as
	// derper's --verify-client-url-fail-open does.
	FailOpen bool
}

// admissionURL asks one admission URL.
type admissionURL struct {
	URLConfig
	client  *http.Client
	slots   chan struct{} // one for each question under way
	breaker *gobreaker.CircuitBreaker[struct{}]
	last    atomic.Pointer[error] // why the last question failed
}

// errUnreachable tells a URL that gave no answer at all from one that gave a
// bad one.
var errUnreachable = errors.New("admission URL cannot be reached")

// URL asks an admission URL in the protocol of derper's --verify-client-url,
// which Headscale's /verify speaks: a POST of tailcfg.DERPAdmitClientRequest,
// answered by tailcfg.DERPAdmitClientResponse.
func URL(c URLConfig) Source {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = urlAtOnce
	u := &admissionURL{
		URLConfig: c,
		client: &http.Client{
			Transport: transport,
			// The answer to a POST must not come from somewhere else.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		slots: make(chan struct{}, urlAtOnce),
		breaker: gobreaker.NewCircuitBreaker[struct{}](gobreaker.Settings{
			Timeout:      breakFor,
			ReadyToTrip:  func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= breakAfter },
			IsSuccessful: func(err error) bool { return err == nil || errors.Is(err, ErrRefused) },
			// Another source was quicker: that says nothing about this one.
			IsExcluded: func(err error) bool { return errors.Is(err, context.Canceled) },
		}),
	}
	return Source{Name: "url " + redacted(c.Target), Ask: u.ask}
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
			err = fmt.Errorf("not asked for a moment, since: %w", *last)
		}
	case err != nil && !errors.Is(err, ErrRefused) && !errors.Is(err, context.Canceled):
		u.last.Store(&err)
	}
	if u.FailOpen && errors.Is(err, errUnreachable) {
		return time.Time{}, nil
	}
	return time.Now(), err
}

func (u *admissionURL) post(ctx context.Context, node key.NodePublic, addr netip.Addr) error {
	select {
	case u.slots <- struct{}{}:
		defer func() { <-u.slots }()
	case <-ctx.Done():
		return fmt.Errorf("waiting for %d questions under way: %w", urlAtOnce, ctx.Err())
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
	res, err := u.client.Do(req)
	if err != nil {
		if inner, ok := errors.AsType[*url.Error](err); ok {
			err = inner.Err // the URL may hold a token
		}
		return fmt.Errorf("%w: %w", errUnreachable, err)
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("admission URL answered %s", res.Status)
	}
	return parseAnswer(io.LimitReader(res.Body, maxAnswer))
}

// parseAnswer takes only a JSON object that holds Allow for an answer: a login
// page or an empty object is neither a yes nor a no.
func parseAnswer(r io.Reader) error {
	var answer struct{ Allow *bool }
	if err := json.NewDecoder(r).Decode(&answer); err != nil {
		return fmt.Errorf("reading admission answer: %w", err)
	}
	switch {
	case answer.Allow == nil:
		return errors.New("admission answer holds no Allow")
	case !*answer.Allow:
		return ErrRefused
	}
	return nil
}

// redacted is target without what may be secret in it.
func redacted(target string) string {
	u, err := url.Parse(target)
	if err != nil {
		return "(unparsable)"
	}
	u.User, u.RawQuery, u.Fragment = nil, "", ""
	return u.String()
}
