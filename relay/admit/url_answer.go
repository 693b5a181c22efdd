package admit

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"derpd/internal/redact"
)

// maxRedirects limits the redirects of one question.
const maxRedirects = 5

// isVerify is the question about an answer that no admission URL gives.
const isVerify = "is this Headscale's /verify?"

// checkRedirect follows 307 and 308, which repeat the POST, on the same server. Any
// other redirect is the answer, and [explainStatus] names its target. It implements
// CheckRedirect of [http.Client].
func checkRedirect(next *http.Request, via []*http.Request) error {
	status, from := next.Response.StatusCode, via[len(via)-1].URL
	repeats := status == http.StatusTemporaryRedirect || status == http.StatusPermanentRedirect
	if !repeats || !sameServer(from, next.URL) || len(via) > maxRedirects {
		return http.ErrUseLastResponse
	}
	if next.URL.User == nil {
		next.URL.User = from.User // credentials of this server
	}
	return nil
}

// sameServer reports whether a redirect stays on the server: the same host, and
// either the same scheme and port, or https in place of http. A redirect from http to
// https needs another port.
func sameServer(from, to *url.URL) bool {
	if !strings.EqualFold(from.Hostname(), to.Hostname()) {
		return false
	}
	return from.Scheme == "http" && to.Scheme == "https" || from.Scheme == to.Scheme && port(from) == port(to)
}

func port(u *url.URL) string {
	switch {
	case u.Port() != "":
		return u.Port()
	case u.Scheme == "https":
		return "443"
	}
	return "80"
}

// statusRemedies are the likely causes and fixes, by HTTP status.
var statusRemedies = map[int]string{
	http.StatusBadRequest:         "check http and https in the URL; " + isVerify,
	http.StatusUnauthorized:       "the server or a proxy wants credentials: write them into the URL (https://USER:PASSWORD@…), or let POST /verify pass without",
	http.StatusForbidden:          "a proxy or a firewall refuses this relay: let POST /verify from this relay's address pass",
	http.StatusNotFound:           "the path is wrong, or Headscale is older than 0.24; " + isVerify,
	http.StatusMethodNotAllowed:   "the path is wrong; " + isVerify,
	http.StatusProxyAuthRequired:  "the proxy in HTTP_PROXY or HTTPS_PROXY wants credentials: write them into that URL, or name the server in NO_PROXY",
	http.StatusTooManyRequests:    "the server or a proxy limits this relay: exempt POST /verify from the limit",
	http.StatusBadGateway:         "the proxy in front of the server does not reach it: check that the server runs",
	http.StatusServiceUnavailable: "the proxy in front of the server does not reach it: check that the server runs",
	http.StatusGatewayTimeout:     "the proxy in front of the server does not reach it: check that the server runs",
}

// explainStatus returns the error for an answer with another status than 200.
func explainStatus(res *http.Response) error {
	status := fmt.Sprintf("admission URL answered %d %s", res.StatusCode, http.StatusText(res.StatusCode))
	target, err := res.Location()
	if res.StatusCode/100 == 3 && err == nil {
		return fmt.Errorf("%s and leads to %s; %s", status, shortLine(redact.URL(target.String())), redirectRemedy(res.Request, target))
	}
	remedy, known := statusRemedies[res.StatusCode]
	switch {
	case known:
		return fmt.Errorf("%s; %s", status, remedy)
	case res.StatusCode >= http.StatusInternalServerError:
		return fmt.Errorf("%s; the server or a proxy in front of it fails: see its log", status)
	}
	return fmt.Errorf("%s; %s", status, isVerify)
}

// redirectRemedy is the fix for a redirect that is not followed.
func redirectRemedy(asked *http.Request, target *url.URL) string {
	followed := 0
	for r := asked; r.Response != nil; r = r.Response.Request {
		followed++
	}
	switch {
	case followed >= maxRedirects:
		return fmt.Sprintf("that is redirect %d; set DERP_VERIFY_CLIENT_URL to the URL that answers", followed+1)
	case sameServer(asked.URL, target):
		return "set DERP_VERIFY_CLIENT_URL to that URL"
	case asked.URL.Scheme == "https" && target.Scheme != "https":
		return "a redirect from https to " + shortLine(target.Scheme) + " is not followed; correct it in the server or the proxy"
	}
	return "a redirect to another server is not followed; set DERP_VERIFY_CLIENT_URL to that URL if it is Headscale's /verify"
}

// parseAnswer returns nil for Allow true and ErrRefused for Allow false. An
// answer without Allow, such as a login page or an empty object, is an error.
func parseAnswer(r io.Reader) error {
	text, err := io.ReadAll(io.LimitReader(r, maxAnswer))
	if err != nil {
		return fmt.Errorf("reading admission answer: %w", err)
	}
	text = bytes.TrimSpace(text)
	var answer struct{ Allow *bool }
	err = json.NewDecoder(bytes.NewReader(text)).Decode(&answer)
	switch {
	case len(text) == 0:
		return errors.New("admission answer is empty; " + isVerify)
	case text[0] == '<':
		return errors.New("admission answer is a web page; " + isVerify)
	case err != nil:
		return fmt.Errorf("admission answer is no JSON object: %w; %s", err, isVerify)
	case answer.Allow == nil:
		return errors.New("admission answer has no field Allow; " + isVerify)
	case !*answer.Allow:
		return ErrRefused
	}
	return nil
}
