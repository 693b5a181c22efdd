package admit

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/rs/zerolog"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
	"tailscale.com/atomicfile"
	tailscale "tailscale.com/client/tailscale/v2"
	"tailscale.com/types/key"
)

const (
	pollTimeout   = 30 * time.Second
	maxDevices    = 64 << 20 // of the API's answer, in bytes; a device takes about one thousand
	maxBackoff    = 15 * time.Minute
	maxRetryAfter = time.Hour
	maxSaveAge    = 10 * time.Minute
	maxCause      = 300 // of what an operator is told about a failure, in bytes

	// freshPolls is how many intervals old a list may be to say no: a device
	// that joined since is not on it.
	freshPolls = 3
)

// errUnchanged is the API's answer that the list is still the last one.
var errUnchanged = errors.New("not modified")

// TailnetConfig says whose devices are admitted, and how they are found.
type TailnetConfig struct {
	Tailnet string // empty or "-" for the credential's own

	// The credential: an API key or an OAuth client, which needs the scope
	// devices:core:read.
	APIKey                           string
	OAuthClientID, OAuthClientSecret string

	External bool          // admit devices that were shared into the tailnet too
	Interval time.Duration // between polls
	Grace    time.Duration // how long the last good list admits while the API does not answer
	Path     string        // file of the last good list
	BaseURL  *url.URL      // nil for https://api.tailscale.com
	Log      zerolog.Logger

	transport http.RoundTripper // nil for http.DefaultTransport; tests have a network of their own
}

// Tailnet admits the devices of a tailnet, of which Tailscale's API gives the
// list. It starts with the last good list of an earlier run, if there is one;
// only Run asks the API.
func Tailnet(c TailnetConfig) (Source, error) {
	if (c.APIKey == "") == (c.OAuthClientID == "") || (c.OAuthClientID == "") != (c.OAuthClientSecret == "") {
		return Source{}, errors.New("preparing Tailscale's API: want either an API key or the ID and the secret of an OAuth client")
	}
	if c.Interval <= 0 {
		return Source{}, fmt.Errorf("preparing Tailscale's API: want an interval above zero, got %s", c.Interval)
	}
	c.Tailnet = cmp.Or(c.Tailnet, "-")
	if c.BaseURL == nil {
		c.BaseURL = &url.URL{Scheme: "https", Host: "api.tailscale.com"}
	}
	if c.transport == nil {
		c.transport = http.DefaultTransport
	}
	t := &tailnet{TailnetConfig: c}
	t.client = &tailscale.Client{
		BaseURL:   c.BaseURL,
		UserAgent: "derpd",
		APIKey:    c.APIKey,
		Tailnet:   c.Tailnet,
		HTTP:      &http.Client{Transport: t},
	}
	t.oauth = clientcredentials.Config{
		ClientID:     c.OAuthClientID,
		ClientSecret: c.OAuthClientSecret,
		TokenURL:     c.BaseURL.JoinPath("api/v2/oauth/token").String(),
		AuthStyle:    oauth2.AuthStyleInParams,
	}
	t.load()
	name := "tailnet " + c.Tailnet
	if c.Tailnet == "-" {
		name = "tailnet of the API credential"
	}
	return Source{Name: name, Local: true, Ask: t.ask, Run: t.run}, nil
}

type tailnet struct {
	TailnetConfig
	client *tailscale.Client
	oauth  clientcredentials.Config

	// These belong to the goroutine of run.
	token    *oauth2.Token // nil with an API key
	received http.Header   // of the last answer, good or not
	header   http.Header   // of the answer that holds the last good list
	backoff  time.Duration // 0 while the API answers
	status   int           // of the last failure, 0 if there was no answer
	saved    time.Time     // the age of the file, if it is of this run
	unsaved  bool          // the last writing failed

	mu      sync.Mutex // run, the only writer, reads without it
	good    deviceList // the last good list; guarded by mu
	failure error      // of the last poll; guarded by mu
	since   time.Time  // of the first failure in a row; guarded by mu
}

// deviceList is also the form of the file.
type deviceList struct {
	Tailnet  string                       `json:"tailnet"`
	External bool                         `json:"external"`
	Read     time.Time                    `json:"read"`
	Devices  map[key.NodePublic]time.Time `json:"devices"` // when their keys expire, the zero time for never
}

func expired(expires, now time.Time) bool {
	return !expires.IsZero() && !now.Before(expires)
}

func (t *tailnet) ask(_ context.Context, node key.NodePublic, _ netip.Addr) (time.Time, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	age := now.Sub(t.good.Read)
	expires, listed := t.good.Devices[node]
	listed = listed && !expired(expires, now)
	switch {
	case listed && age <= max(t.Grace, freshPolls*t.Interval):
		return t.good.Read, nil
	case !listed && age <= freshPolls*t.Interval:
		return t.good.Read, ErrRefused
	case t.failure != nil:
		return time.Time{}, fmt.Errorf("no list of devices since %s: %w", t.since.UTC().Format(time.RFC3339), t.failure)
	}
	return time.Time{}, errors.New("no list of devices from Tailscale's API yet")
}

func (t *tailnet) run(ctx context.Context, changed func()) error {
	for {
		wait := t.poll(ctx, changed)
		select {
		case <-ctx.Done():
			return nil
		// Relays that started together must not ask together for ever.
		case <-time.After(wait + rand.N(wait/10+1)):
		}
	}
}

// poll asks once, and returns how long to wait before asking again.
func (t *tailnet) poll(ctx context.Context, changed func()) time.Duration {
	now := time.Now().UTC() // of the question: the answer is not older
	asking, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	answer, err := t.list(asking)
	var devices map[key.NodePublic]time.Time
	switch {
	case ctx.Err() != nil:
		return 0
	case errors.Is(err, errUnchanged):
		devices = maps.Clone(t.good.Devices)
		maps.DeleteFunc(devices, func(_ key.NodePublic, expires time.Time) bool { return expired(expires, now) })
	case err == nil:
		if devices, err = t.admitted(answer, now); err == nil {
			t.header = t.received
		}
	}
	if devices == nil {
		return t.failed(err)
	}
	before, wasFailing := t.good.Devices, t.failure != nil
	t.mu.Lock()
	t.good = deviceList{Tailnet: t.Tailnet, External: t.External, Read: now, Devices: devices}
	t.failure, t.backoff = nil, 0
	t.mu.Unlock()
	if wasFailing {
		t.Log.Info().Int("devices", len(devices)).Msg("Tailscale's API answers again")
	}
	if now.Sub(t.saved) >= min(maxSaveAge, t.Grace/10) || !maps.EqualFunc(before, devices, time.Time.Equal) {
		t.save()
	}
	if before == nil || !maps.EqualFunc(before, devices, func(_, _ time.Time) bool { return true }) {
		t.Log.Info().Int("devices", len(devices)).Msg("devices of the tailnet changed")
		changed()
	}
	return t.Interval
}

// admitted picks the devices that may connect. No device at all is no list: an
// API key of the wrong tailnet must not cut everybody off, nor a key format
// that we do not know yet.
func (t *tailnet) admitted(answer []tailscale.Device, now time.Time) (map[key.NodePublic]time.Time, error) {
	devices := make(map[key.NodePublic]time.Time)
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
			devices[node] = expires
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

func (t *tailnet) failed(err error) time.Duration {
	bad, _ := errors.AsType[badStatus](err)
	failure, known := t.explain(err), t.failure != nil && t.status == bad.status
	t.status = bad.status
	if bad.status == http.StatusUnauthorized {
		t.token = nil // revoked before its time
	}
	t.mu.Lock()
	if t.failure == nil {
		t.since = time.Now()
	}
	t.failure = failure
	t.mu.Unlock()
	if !known {
		t.Log.Warn().Err(failure).Int("devices", len(t.good.Devices)).Msg("devices of the tailnet not read: the last good list stays in force for DERP_VERIFY_GRACE")
	}
	t.backoff = max(t.Interval, min(2*t.backoff, maxBackoff))
	return max(t.backoff, bad.retryAfter)
}

// explain is err as an operator may read it: short, on one line, without
// credentials, and with the fix. err may hold what the API or a proxy wrote.
func (t *tailnet) explain(err error) error {
	bad, _ := errors.AsType[badStatus](err)
	if long, ok := errors.AsType[*http.MaxBytesError](err); ok {
		err = fmt.Errorf("the answer is longer than %d bytes", long.Limit)
	} else if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("no answer within %s", pollTimeout)
	}
	secrets := []string{t.APIKey, t.OAuthClientSecret}
	if t.token != nil {
		secrets = append(secrets, t.token.AccessToken)
	}
	cause := err.Error()
	for _, secret := range secrets {
		if secret != "" {
			cause = strings.ReplaceAll(cause, secret, "…")
		}
	}
	cause = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, cause)
	if len(cause) > maxCause {
		cause = strings.ToValidUTF8(cause[:maxCause], "") + "…"
	}
	return errors.New("asking Tailscale's API: " + cause + remedies[bad.status])
}

// remedies are what to do, by status.
var remedies = map[int]string{
	http.StatusUnauthorized: "; make a new API key (it expires after at most 90 days) or OAuth client (it does not): https://login.tailscale.com/admin/settings/keys",
	http.StatusForbidden:    "; give the OAuth client the scope devices:core:read, or make the API key as an admin",
	http.StatusNotFound:     "; DERP_TAILNET names no tailnet of this credential: leave it empty for the credential's own",
}

// badStatus is any answer but 200 and the 304 that was asked for.
type badStatus struct {
	status     int
	message    string        // of the API, unbounded and unclean
	retryAfter time.Duration // 0 unless it asks for a pause
}

func (e badStatus) Error() string {
	text := fmt.Sprintf("%d %s", e.status, http.StatusText(e.status))
	if e.message != "" {
		text += ": " + e.message
	}
	return text
}

// list asks for the devices. Tokens are fetched here and not by the client's own
// OAuth, which does it without a timeout and shows the answer in its errors.
func (t *tailnet) list(ctx context.Context) ([]tailscale.Device, error) {
	if t.OAuthClientID != "" {
		source := t.oauth.TokenSource(context.WithValue(ctx, oauth2.HTTPClient, t.client.HTTP))
		token, err := oauth2.ReuseTokenSource(t.token, source).Token()
		if err != nil {
			return nil, fmt.Errorf("getting an access token: %w", err)
		}
		t.token = token
	}
	return t.client.Devices().List(ctx)
}

// RoundTrip implements [http.RoundTripper]. It makes every answer but 200 an
// error: the client would take a 304 for an empty list, and lose the status of
// an error page that is not the API's.
func (t *tailnet) RoundTrip(req *http.Request) (*http.Response, error) {
	conditional := false
	if req.Method == http.MethodGet {
		req = req.Clone(req.Context())
		if t.token != nil {
			t.token.SetAuthHeader(req)
		}
		for condition, validator := range map[string]string{"If-None-Match": "ETag", "If-Modified-Since": "Last-Modified"} {
			if value := t.header.Get(validator); value != "" {
				req.Header.Set(condition, value)
				conditional = true
			}
		}
	}
	res, err := t.transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	t.received = res.Header
	if res.StatusCode == http.StatusOK {
		res.Body = http.MaxBytesReader(nil, res.Body, maxDevices)
		return res, nil
	}
	defer func() { _ = res.Body.Close() }()
	if conditional && res.StatusCode == http.StatusNotModified {
		return nil, errUnchanged
	}
	bad := badStatus{status: res.StatusCode}
	var answer tailscale.APIError
	if json.NewDecoder(io.LimitReader(res.Body, maxAnswer)).Decode(&answer) == nil {
		bad.message = answer.Message
	}
	if bad.status == http.StatusTooManyRequests || bad.status == http.StatusServiceUnavailable {
		bad.retryAfter = retryAfter(res.Header.Get("Retry-After"))
	}
	return nil, bad
}

func retryAfter(value string) time.Duration {
	if seconds, err := strconv.Atoi(value); err == nil {
		return time.Duration(min(seconds, int(maxRetryAfter/time.Second))) * time.Second
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	return min(time.Until(at), maxRetryAfter)
}

// load takes up the list of an earlier run. A file that is no good list is only
// reported: it is a cache.
func (t *tailnet) load() {
	text, err := os.ReadFile(t.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var list deviceList
	if err == nil {
		list, err = parseDevices(text)
	}
	if err == nil && (list.Tailnet != t.Tailnet || list.External && !t.External) {
		err = errors.New("it was made with another DERP_TAILNET, or with shared devices")
	}
	if err != nil {
		t.Log.Warn().Err(err).Str("file", t.Path).Msg("last good list of devices not used: nobody is admitted by it until Tailscale's API answers")
		return
	}
	t.good = list
}

func parseDevices(text []byte) (deviceList, error) {
	var list deviceList
	if err := json.Unmarshal(text, &list); err != nil {
		return deviceList{}, err
	}
	_, zero := list.Devices[key.NodePublic{}]
	switch {
	case list.Devices == nil || zero:
		return deviceList{}, errors.New("it holds no list of node keys")
	case list.Read.IsZero() || list.Read.After(time.Now()):
		return deviceList{}, fmt.Errorf("it claims to be of %s", list.Read)
	}
	return list, nil
}

func (t *tailnet) save() {
	text, err := json.Marshal(t.good)
	if err == nil {
		err = atomicfile.WriteFile(t.Path, append(text, '\n'), 0o600)
	}
	if err != nil && !t.unsaved {
		t.Log.Warn().Err(err).Msg("list of devices not saved: nobody is admitted by it after a restart until Tailscale's API answers")
	}
	t.unsaved = err != nil
	if err == nil {
		t.saved = t.good.Read
	}
}
