package admit

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
	tailscale "tailscale.com/client/tailscale/v2"
	"tailscale.com/types/key"
)

const (
	// minPollInterval is the shortest time between two requests to Tailscale's
	// API, which has a rate limit.
	minPollInterval = 15 * time.Second

	pollTimeout = 30 * time.Second
	maxBackoff  = 15 * time.Minute

	// freshPolls is the age, in intervals, up to which a list may refuse a
	// node. An older list may lack a device that has joined since.
	freshPolls = 3
)

// TailnetConfig is the tailnet to admit, and the access to its list of devices.
type TailnetConfig struct {
	Tailnet string // empty or "-" for the tailnet of the credential

	// The credential is an API key, or an OAuth client with the scope
	// devices:core:read.
	APIKey                           string
	OAuthClientID, OAuthClientSecret string

	External bool           // admit devices that were shared into the tailnet too
	Interval time.Duration  // between polls, raised to minPollInterval (15 s)
	Grace    time.Duration  // how long the last list admits while the API does not answer
	BaseURL  *url.URL       // nil for https://api.tailscale.com
	Roots    *x509.CertPool // nil for the system's
	Log      zerolog.Logger

	transport http.RoundTripper // nil for one with Roots; set by tests
}

// Tailnet returns a source that admits the devices of a tailnet, which Tailscale's
// API lists. Only Run calls the API. The source is unavailable until Run has a
// list.
func Tailnet(c TailnetConfig) (Source, error) {
	if (c.APIKey == "") == (c.OAuthClientID == "") || (c.OAuthClientID == "") != (c.OAuthClientSecret == "") {
		return Source{}, errors.New("preparing Tailscale's API: want either an API key or the ID and the secret of an OAuth client")
	}
	c.Tailnet = cmp.Or(c.Tailnet, "-")
	c.Interval = max(c.Interval, minPollInterval)
	if c.BaseURL == nil {
		c.BaseURL = &url.URL{Scheme: "https", Host: "api.tailscale.com"}
	}
	t := &tailnet{TailnetConfig: c, api: newTailnetAPI(c)}
	name := "tailnet " + c.Tailnet
	if c.Tailnet == "-" {
		name = "tailnet of the API credential"
	}
	return Source{Name: name, Local: true, Ask: t.ask, Run: t.run, Describe: t.describe}, nil
}

// deviceList is the devices that may connect.
type deviceList map[key.NodePublic]listedDevice

type listedDevice struct {
	expires time.Time // when the node key expires; zero for never
	name    string    // in DNS
	tags    []string
}

type tailnet struct {
	TailnetConfig

	// These fields are used only by the goroutine of run.
	api     *tailnetAPI
	backoff time.Duration // 0 while the API answers
	status  int           // HTTP status of the last failure, 0 without an answer

	mu      sync.Mutex // run is the only writer, and reads without it
	devices deviceList // last good list, nil before the first; guarded by mu
	read    time.Time  // time of the request for devices; guarded by mu
	failure error      // of the last poll; guarded by mu
	since   time.Time  // time of the first of the consecutive failures; guarded by mu
}

func expired(expires, now time.Time) bool {
	return !expires.IsZero() && !now.Before(expires)
}

func (t *tailnet) ask(_ context.Context, node key.NodePublic, _ netip.Addr) (time.Time, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	age := now.Sub(t.read)
	d, listed := t.devices[node]
	listed = listed && !expired(d.expires, now)
	switch {
	case listed && age <= max(t.Grace, freshPolls*t.Interval):
		return t.read, nil
	case !listed && age <= freshPolls*t.Interval:
		return t.read, ErrRefused
	case t.failure != nil:
		return time.Time{}, fmt.Errorf("no list of devices since %s: %w", t.since.UTC().Format(time.RFC3339), t.failure)
	}
	return time.Time{}, errors.New("no list of devices from Tailscale's API yet")
}

// describe implements [Source].
func (t *tailnet) describe(node key.NodePublic) (Description, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	d, ok := t.devices[node]
	return Description{Name: d.name, Tailnet: strings.TrimPrefix(t.Tailnet, "-"), Tags: d.tags}, ok
}

func (t *tailnet) run(ctx context.Context, changed func()) error {
	for {
		wait := t.poll(ctx, changed)
		select {
		case <-ctx.Done():
			return nil
		// The random part spreads the requests of relays that started at the
		// same time.
		case <-time.After(wait + rand.N(wait/10+1)):
		}
	}
}

// poll requests the list once, and returns the time to wait before the next poll.
func (t *tailnet) poll(ctx context.Context, changed func()) time.Duration {
	now := time.Now().UTC() // time of the request: the answer is not older
	asking, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	var devices deviceList
	answer, err := t.api.list(asking)
	if err == nil {
		devices, err = t.admissible(answer, now)
	}
	switch {
	case ctx.Err() != nil:
		return 0
	case err != nil:
		return t.failed(err)
	}
	before, wasFailing := t.devices, t.failure != nil
	t.mu.Lock()
	t.devices, t.read = devices, now
	t.failure, t.backoff = nil, 0
	t.mu.Unlock()
	if wasFailing {
		t.Log.Info().Int("devices", len(devices)).Msg("Tailscale's API answers again")
	}
	if before == nil || !maps.EqualFunc(before, devices, func(_, _ listedDevice) bool { return true }) {
		t.Log.Info().Int("devices", len(devices)).Msg("devices of the tailnet changed")
		changed()
	}
	return t.Interval
}

// admissible returns the devices that may connect. A list without any node key
// is an error: a credential of the wrong tailnet, or a new key format, must not
// disconnect every node.
func (t *tailnet) admissible(answer []tailscale.Device, now time.Time) (deviceList, error) {
	devices := make(deviceList)
	unreadable := 0
	for _, d := range answer {
		node, err := parseKey(d.NodeKey)
		if err != nil {
			unreadable++
			continue
		}
		expires := d.Expires.Time
		if d.KeyExpiryDisabled {
			expires = time.Time{}
		}
		if d.Authorized && (t.External || !d.IsExternal) && !expired(expires, now) {
			devices[node] = listedDevice{expires, d.Name, d.Tags}
		}
	}
	if unreadable > 0 {
		t.Log.Debug().Int("devices", unreadable).Msg("devices without a readable node key skipped")
	}
	if unreadable == len(answer) {
		return nil, fmt.Errorf("the API lists no device with a node key (of %d); use a credential of the tailnet that the relay is for", len(answer))
	}
	return devices, nil
}

// failed records a failed poll, and returns the time to wait before the next.
func (t *tailnet) failed(err error) time.Duration {
	bad, _ := errors.AsType[badStatus](err)
	failure, logged := t.api.explain(err), t.failure != nil && t.status == bad.status
	t.status = bad.status
	if bad.status == http.StatusUnauthorized {
		t.api.token = nil // it may have been revoked
	}
	t.mu.Lock()
	if t.failure == nil {
		t.since = time.Now()
	}
	t.failure = failure
	t.mu.Unlock()
	if !logged {
		t.Log.Warn().Err(failure).Int("devices", len(t.devices)).Msg("devices of the tailnet not read; the last list stays in force for DERP_VERIFY_GRACE")
	}
	t.backoff = max(t.Interval, min(2*t.backoff, maxBackoff))
	return max(t.backoff, bad.retryAfter)
}
