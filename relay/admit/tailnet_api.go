package admit

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
	tailscale "tailscale.com/client/tailscale/v2"

	"derpd/internal/redact"
)

const (
	maxDevices    = 64 << 20 // size of a list of devices, in bytes; a device takes about one thousand
	maxRetryAfter = time.Hour
)

// tailnetAPI lists devices through Tailscale's API. One goroutine may use it.
type tailnetAPI struct {
	config TailnetConfig
	client *http.Client
	oauth  clientcredentials.Config
	token  *oauth2.Token // nil with an API key
}

func newTailnetAPI(c TailnetConfig) *tailnetAPI {
	return &tailnetAPI{
		config: c,
		client: &http.Client{
			Transport: cmp.Or[http.RoundTripper](c.transport, transport(c.Roots)),
			// Only the API may list devices: redirects are not followed.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		oauth: clientcredentials.Config{
			ClientID:     c.OAuthClientID,
			ClientSecret: c.OAuthClientSecret,
			TokenURL:     c.BaseURL.JoinPath("api/v2/oauth/token").String(),
			AuthStyle:    oauth2.AuthStyleInParams,
		},
	}
}

// list requests the devices from the API. It does not use the methods of the client
// library. Those methods lose the HTTP status of a proxy's answer, read answers of any
// length, and fetch tokens without a timeout.
func (a *tailnetAPI) list(ctx context.Context) ([]tailscale.Device, error) {
	target := a.config.BaseURL.JoinPath("api/v2/tailnet", url.PathEscape(a.config.Tailnet), "devices")
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", "derpd")
	if err := a.authenticate(req); err != nil {
		return nil, fmt.Errorf("getting an access token: %w", err)
	}
	res, err := a.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
		return nil, newBadStatus(res, body)
	}
	body, err := io.ReadAll(http.MaxBytesReader(nil, res.Body, maxDevices))
	if err != nil {
		return nil, err
	}
	var answer struct {
		Devices []tailscale.Device `json:"devices"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, fmt.Errorf("reading the list of devices: %w", err)
	}
	return answer.Devices, nil
}

// authenticate adds the API key, or a token of the OAuth client, to the request.
func (a *tailnetAPI) authenticate(req *http.Request) error {
	if a.config.OAuthClientID == "" {
		req.SetBasicAuth(a.config.APIKey, "")
		return nil
	}
	if !a.token.Valid() {
		token, err := a.oauth.Token(context.WithValue(req.Context(), oauth2.HTTPClient, a.client))
		if answer, ok := errors.AsType[*oauth2.RetrieveError](err); ok {
			return newBadStatus(answer.Response, answer.Body)
		} else if err != nil {
			return err
		}
		a.token = token
	}
	a.token.SetAuthHeader(req)
	return nil
}

// badStatus is an answer with another status than 200.
type badStatus struct {
	status     int
	message    string        // text of the API, of any length and content
	retryAfter time.Duration // pause in the header Retry-After, or 0
}

func newBadStatus(res *http.Response, body []byte) badStatus {
	bad := badStatus{status: res.StatusCode}
	var answer tailscale.APIError
	if json.Unmarshal(body, &answer) == nil {
		bad.message = answer.Message
	}
	if bad.status == http.StatusTooManyRequests || bad.status == http.StatusServiceUnavailable {
		bad.retryAfter = retryAfter(res.Header.Get("Retry-After"))
	}
	return bad
}

func (e badStatus) Error() string {
	text := fmt.Sprintf("%d %s", e.status, http.StatusText(e.status))
	if e.message != "" {
		text += ": " + e.message
	}
	return text
}

// retryAfter returns the pause in the header, a number of seconds or a date. It is
// at most maxRetryAfter. For any other value it is 0 or less.
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

// explain returns err as a message for operators: short, on one line, without
// credentials, and with the fix. err may contain text of the API or of a proxy.
func (a *tailnetAPI) explain(err error) error {
	bad, _ := errors.AsType[badStatus](err)
	if long, ok := errors.AsType[*http.MaxBytesError](err); ok {
		err = fmt.Errorf("the answer is longer than %d bytes", long.Limit)
	} else if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("no answer within %s", pollTimeout)
	}
	cause := err.Error()
	if failed, ok := errors.AsType[*url.Error](err); ok {
		cause = strings.ReplaceAll(cause, failed.URL, redact.URL(failed.URL))
	}
	secrets := []string{a.config.APIKey, a.config.OAuthClientSecret}
	if a.token != nil {
		secrets = append(secrets, a.token.AccessToken)
	}
	for _, secret := range secrets {
		if secret != "" {
			cause = strings.ReplaceAll(cause, secret, "…")
		}
	}
	return errors.New("asking Tailscale's API: " + shortLine(cause) + remedies[bad.status] + connectionRemedy(err))
}

// remedies are the fixes that operators can make, by HTTP status.
var remedies = map[int]string{
	http.StatusUnauthorized: "; make a new API key (it expires after at most 90 days) or OAuth client (it does not): https://login.tailscale.com/admin/settings/keys",
	http.StatusForbidden:    "; give the OAuth client the scope devices:core:read, or make the API key as an admin",
	http.StatusNotFound:     "; DERP_TAILNET names no tailnet of this credential: leave it empty for the credential's own",
}
