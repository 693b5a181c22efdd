package release

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	// askTimeout limits all requests of one question together.
	askTimeout = 10 * time.Second
	// maxAnswer is the largest answer in bytes. Real ones have some ten thousand.
	maxAnswer = 1 << 20
)

// Build is one build of derpd.
type Build struct {
	Version  string // name of the release, such as 1.104.7-1; any other text is a development build
	Upstream string // version of tailscale.com in it
	Source   string // URL of the repository that publishes it; empty if not known
}

// Answer is the newest release, compared with a build.
type Answer struct {
	Newest string // derpd 1.104.9-1, or tailscale.com v1.104.9
	Newer  bool   // than the build
	Text   string // one line for people, with how to update if Newer
	// GitHub is the reason for which GOPROXY was asked instead of the build's repository.
	// It is nil if the repository answered, or is not on GitHub.
	GitHub error
}

// Asker asks whether a release is newer than a build. It uses HTTPS_PROXY,
// HTTP_PROXY and NO_PROXY as Go does. Its methods may be called at the same time.
type Asker struct {
	build   Build
	goProxy string
	github  string // URL of GitHub's API
	timeout time.Duration
	client  *http.Client
}

// New returns an Asker for a build. goProxy is the value of GOPROXY. It is used if the
// repository of the build is not known, not on GitHub, or GitHub has no answer. Without
// a repository and GOPROXY, the Asker asks for Tailscale's releases on GitHub.
func New(b Build, goProxy string) *Asker {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	// The next question comes after hours.
	transport.DisableKeepAlives = true
	return &Asker{
		build: b, goProxy: strings.Trim(goProxy, " ,|"), github: "https://api.github.com",
		timeout: askTimeout, client: &http.Client{Transport: transport},
	}
}

// Ask returns the newest release within ten seconds. Its error is one line: the
// URL, the cause and the fix. It holds no secret of GOPROXY.
func (a *Asker) Ask(ctx context.Context) (Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	repository, ok := onGitHub(a.build.Source)
	switch {
	case !ok && a.goProxy == "":
		return a.askTailscale(ctx)
	case !ok:
		return a.askProxies(ctx, a.timeout)
	}
	// From mainland China GitHub's API often cannot be reached, a mirror of modules can.
	half := a.timeout / 2
	limited, stop := context.WithTimeout(ctx, half)
	defer stop()
	answer, github := a.askGitHub(limited, repository)
	if github == nil {
		return answer, nil
	}
	answer, err := a.askProxies(ctx, half)
	if err != nil {
		return Answer{}, fmt.Errorf("%w; then %w", github, err)
	}
	answer.GitHub = github
	answer.Text += fmt.Sprintf("; GOPROXY was asked, because %v", github)
	return answer, nil
}

// compared returns the answer for two versions of what.
func compared(what, newest, here string, newer bool, howToUpdate string) Answer {
	a := Answer{Newest: what + " " + newest, Newer: newer}
	switch {
	case newer:
		a.Text = fmt.Sprintf("%s is out (here: %s); %s", a.Newest, here, howToUpdate)
	case newest == here:
		a.Text = a.Newest + " is the newest release"
	default:
		a.Text = fmt.Sprintf("%s is the newest release (here: %s)", a.Newest, here)
	}
	return a
}

// statusError is an answer with another status than 200.
type statusError struct {
	status int
	header http.Header
}

// Error implements error.
func (e *statusError) Error() string {
	return fmt.Sprintf("answered %d %s", e.status, http.StatusText(e.status))
}

// get returns the body of an answer. Its errors do not contain the URL, which may
// hold a secret.
func (a *Asker) get(ctx context.Context, target string) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return nil, errors.New("not a URL")
	}
	request.Header.Set("User-Agent", "derpd")
	response, err := a.client.Do(request)
	if err != nil {
		return nil, withoutURL(err)
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		return nil, &statusError{response.StatusCode, response.Header}
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, withoutURL(err)
	case len(body) > maxAnswer:
		return nil, fmt.Errorf("answered with more than %d bytes", maxAnswer)
	}
	return body, nil
}

func withoutURL(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return errors.New("no answer in time")
	}
	if wrapped, ok := errors.AsType[*url.Error](err); ok {
		return wrapped.Err
	}
	return err
}
