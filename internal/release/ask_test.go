package release

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"derpd/internal/testkit"
)

// server starts an HTTP server that ends with the test, also while a handler hangs.
func server(t *testing.T, handler http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(handler)
	t.Cleanup(s.Close)
	t.Cleanup(s.CloseClientConnections)
	return s.URL
}

// text answers every request with a text.
func text(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// hang never answers.
func hang(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// huge answers without an end.
func huge(w http.ResponseWriter, _ *http.Request) {
	for block := []byte(strings.Repeat("v1.104.9\n", 1000)); ; {
		if _, err := w.Write(block); err != nil {
			return
		}
	}
}

// limited is GitHub's answer to one request too many.
func limited(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("X-RateLimit-Remaining", "0")
	w.Header().Set("X-RateLimit-Reset", fmt.Sprint(time.Date(2026, 11, 28, 7, 30, 0, 0, time.UTC).Unix()))
	text(http.StatusForbidden, `{"message":"API rate limit exceeded for 203.0.113.7."}`)(w, nil)
}

// latest is GitHub's answer with this tag.
func latest(tag string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/repos/someone/derpd/releases/latest" || r.Header.Get("User-Agent") != "derpd" {
			http.NotFound(w, r)
			return
		}
		_, _ = fmt.Fprintf(w, `{"tag_name":%q,"draft":false,"body":"notes"}`, tag)
	}
}

func TestAskGitHub(t *testing.T) {
	released := Build{Version: "1.104.7-1", Upstream: "v1.104.7"}
	for name, tt := range map[string]struct {
		build   Build
		handler http.HandlerFunc
		newer   bool
		want    string // the answer, or a part of the error
	}{
		"same":             {released, latest("v1.104.7-1"), false, "derpd 1.104.7-1 is the newest release"},
		"newer":            {released, latest("v1.104.9-1"), true, "derpd 1.104.9-1 is out (here: 1.104.7-1); pull its image, or take its archive from https://github.com/someone/derpd/releases"},
		"numbers":          {Build{Version: "1.104.7-9"}, latest("v1.104.7-10"), true, "derpd 1.104.7-10 is out (here: 1.104.7-9); "},
		"older":            {Build{Version: "1.106.0-1"}, latest("v1.104.9-1"), false, "derpd 1.104.9-1 is the newest release (here: 1.106.0-1)"},
		"name with v":      {Build{Version: "v1.104.7-1"}, latest("v1.104.7-1"), false, "derpd 1.104.7-1 is the newest release"},
		"development":      {Build{Version: "v1.104.7-1-3-g0123456", Upstream: "v1.104.7"}, latest("v1.104.7-2"), false, "derpd 1.104.7-2 is the newest release (here: development build v1.104.7-1-3-g0123456)"},
		"old development":  {Build{Version: "dev", Upstream: "v1.104.7"}, latest("v1.104.9-1"), true, "derpd 1.104.9-1 is out (here: development build dev); "},
		"unknown upstream": {Build{Version: "dev", Upstream: "unknown"}, latest("v1.104.9-1"), false, "derpd 1.104.9-1 is the newest release (here: development build dev)"},
		"renamed": {released, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/repositories/7/releases/latest" {
				r.URL.Path = "/repos/someone/derpd/releases/latest"
				latest("v1.104.9-1")(w, r)
				return
			}
			http.Redirect(w, r, "/repositories/7/releases/latest", http.StatusMovedPermanently)
		}, true, "derpd 1.104.9-1 is out (here: 1.104.7-1); "},
		"404":             {released, text(http.StatusNotFound, "{}"), false, "/repos/someone/derpd/releases/latest: answered 404 Not Found; the repository has no release, or is not public"},
		"rate limit":      {released, limited, false, ": answered 403 Forbidden; too many requests from this address; try again after 07:30 UTC"},
		"429":             {released, text(http.StatusTooManyRequests, ""), false, ": answered 429 Too Many Requests; too many requests from this address; try again in an hour"},
		"403":             {released, text(http.StatusForbidden, "blocked"), false, ": answered 403 Forbidden; try again later, or set HTTPS_PROXY if GitHub cannot be reached from here"},
		"hangs":           {released, hang, false, ": no answer in time; try again later, or set HTTPS_PROXY"},
		"huge":            {released, huge, false, ": answered with more than 1048576 bytes; try again later"},
		"garbage":         {released, text(http.StatusOK, "<html>log in</html>"), false, ": not an answer of GitHub's API: invalid character '<' looking for beginning of value; set HTTPS_PROXY"},
		"another project": {released, text(http.StatusOK, `{"tag_name":"nightly\n`+strings.Repeat("x", 1000)+`"}`), false, `: the latest release is not one of derpd (got tag "nightly\n` + strings.Repeat("x", 32) + `"); build`},
		"redirects": {released, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path, http.StatusFound)
		}, false, ": stopped after 10 redirects; try"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tt.build.Source = "https://github.com/someone/derpd"
			a := New(tt.build, "off")
			a.github = server(t, tt.handler)
			if name == "hangs" {
				a.timeout = 100 * time.Millisecond
			}
			assertAnswer(t, a, tt.newer, tt.want)
		})
	}
}

// TestGitHubOrProxies asserts that a published build asks GOPROXY when GitHub has no
// answer, and says so.
func TestGitHubOrProxies(t *testing.T) {
	good := server(t, text(http.StatusOK, versions))
	for name, tt := range map[string]struct {
		github   http.HandlerFunc
		goProxy  string
		upstream string
		newer    bool
		want     []string
	}{
		"newer": {text(http.StatusForbidden, "blocked"), good, "v1.104.7", true, []string{
			"tailscale.com v1.104.9 is out (here: v1.104.7); take a newer release of derpd, or run `make upstream` in its sources; GOPROXY was asked, because http://",
			"/repos/someone/derpd/releases/latest: answered 403 Forbidden; try again later, or set HTTPS_PROXY if GitHub cannot be reached from here",
		}},
		"same":        {text(http.StatusNotFound, ""), good, "v1.104.9", false, []string{"tailscale.com v1.104.9 is the newest release; GOPROXY was asked, because http://", "answered 404"}},
		"hangs":       {hang, good, "v1.104.7", true, []string{"v1.104.9 is out", "/latest: no answer in time; "}},
		"both hang":   {hang, server(t, hang), "v1.104.7", false, []string{"/latest: no answer in time; try again later, or set HTTPS_PROXY if GitHub cannot be reached from here; then GOPROXY: http://", ": no answer in time; set GOPROXY"}},
		"off":         {limited, "off", "v1.104.7", false, []string{"too many requests", "; then GOPROXY: off names no proxy to ask; set GOPROXY"}},
		"not needed":  {latest("v1.104.9-1"), server(t, hang), "v1.104.7", true, []string{"derpd 1.104.9-1 is out (here: 1.104.7-1); pull"}},
		"both refuse": {text(http.StatusForbidden, ""), server(t, text(http.StatusForbidden, "")), "v1.104.7", false, []string{"/latest: answered 403", "; then GOPROXY: http://"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := New(Build{Version: "1.104.7-1", Upstream: tt.upstream, Source: "https://github.com/someone/derpd"}, tt.goProxy)
			a.github = server(t, tt.github)
			if strings.Contains(name, "hang") {
				a.timeout = time.Second
			}
			for _, part := range tt.want {
				assertAnswer(t, a, tt.newer, part)
			}
			answer, _ := a.Ask(t.Context())
			if instead := strings.Contains(answer.Text, "GOPROXY was asked"); instead != (answer.GitHub != nil) {
				t.Errorf("%s, GitHub %v", answer.Text, answer.GitHub)
			}
		})
	}
}

// assertAnswer asks, and compares the text or the error. Both are one line.
func assertAnswer(t *testing.T, a *Asker, newer bool, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	began := time.Now()
	answer, err := a.Ask(ctx)
	got := answer.Text
	if err != nil {
		got = err.Error()
	}
	if !strings.Contains(got, want) || answer.Newer != newer || strings.ContainsAny(got, "\r\n") {
		t.Errorf("newer %t, %s\nwant  %t, %s", answer.Newer, got, newer, want)
	}
	if took := time.Since(began); took > askTimeout+askTimeout/2 {
		t.Errorf("took %v", took)
	}
}

// versions is the answer of a module proxy.
const versions = "v1.104.7\nv1.105.99\nv1.104.9\nv1.106.0-pre\nv1.98.2\n"

func TestAskProxies(t *testing.T) {
	old := Build{Version: "1.104.7-1", Upstream: "v1.104.7"}
	list := func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/tailscale.com/@v/list" && r.URL.Path != "/below/tailscale.com/@v/list" {
			http.NotFound(w, r)
			return
		}
		_, _ = io.WriteString(w, versions)
	}
	good := server(t, list)
	missing := server(t, text(http.StatusNotFound, "not found"))
	gone := server(t, text(http.StatusGone, "gone"))
	refusing := server(t, text(http.StatusForbidden, "This module is not available."))
	hanging := server(t, hang)
	redirecting := server(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, good+r.URL.Path, http.StatusFound)
	})
	withUser := server(t, func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "reader" || password != "s3cret" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		list(w, r)
	})
	as := func(proxy, user string) string { return strings.Replace(proxy, "://", "://"+user+"@", 1) }

	const isOut = "tailscale.com v1.104.9 is out (here: v1.104.7); take a newer release of derpd, or run `make upstream` in its sources"
	for name, tt := range map[string]struct {
		build   Build
		goProxy string
		newer   bool
		want    string
	}{
		"newer":                  {old, good, true, isOut},
		"path, slash and blanks": {old, " " + good + "/below/ ", true, isOut},
		"same":                   {Build{Upstream: "v1.104.9"}, good, false, "tailscale.com v1.104.9 is the newest release"},
		"older":                  {Build{Upstream: "v1.106.0"}, good, false, "tailscale.com v1.104.9 is the newest release (here: v1.106.0)"},
		"unknown":                {Build{Upstream: "unknown"}, good, false, "tailscale.com v1.104.9 is the newest release (here: unknown)"},
		"not on GitHub":          {Build{Upstream: "v1.104.7", Source: "https://git.example.com/someone/derpd"}, good, true, isOut},
		"redirect":               {old, redirecting, true, isOut},
		"user":                   {old, as(withUser, "reader:s3cret"), true, isOut},
		"wrong user":             {old, as(withUser, "s3cret:s3cret") + "/s3cret", false, "GOPROXY: " + withUser + ": answered 401 Unauthorized; set GOPROXY"},
		"404, next":              {old, missing + "," + gone + "," + good, true, isOut},
		"403, no next":           {old, refusing + "," + good, false, "GOPROXY: " + refusing + ": answered 403 Forbidden; set GOPROXY to a module proxy that can be reached from here, or HTTPS_PROXY"},
		"403, pipe":              {old, refusing + "|" + good + ",direct", true, isOut},
		"hangs, pipe":            {old, hanging + "|" + good, true, isOut},
		"hangs":                  {old, hanging + ",direct", false, "GOPROXY: " + hanging + ": no answer in time; set GOPROXY"},
		"404, direct":            {old, missing + "," + refusing + "|direct," + good, false, "GOPROXY: " + missing + ": answered 404 Not Found, then " + refusing + ": answered 403 Forbidden, then direct names no proxy to ask; set GOPROXY"},
		"direct":                 {old, "direct", false, "GOPROXY: direct names no proxy to ask; set GOPROXY"},
		"off":                    {old, "off," + good, false, "GOPROXY: off names no proxy to ask; set GOPROXY"},
		"empty entries":          {old, ",|," + good, true, isOut},
		"file":                   {old, "file:///s3cret", false, "GOPROXY: an entry: not an http or https URL; set"},
		"not a URL":              {old, "http://[s3cret", false, "GOPROXY: an entry: not an http or https URL; set"},
		"huge":                   {old, server(t, huge), false, ": answered with more than 1048576 bytes; set"},
		"garbage":                {old, server(t, text(http.StatusOK, "<html>v1.104\n</html>")), false, ": its answer has no stable version of tailscale.com; set"},
		"cut off": {old, server(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			_, _ = io.WriteString(w, versions)
		}), false, ": unexpected EOF; set"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := New(tt.build, tt.goProxy)
			if strings.Contains(name, "hangs") {
				a.timeout = 500 * time.Millisecond
			}
			assertAnswer(t, a, tt.newer, tt.want)
			if _, err := a.Ask(t.Context()); err != nil && strings.Contains(err.Error(), "s3cret") {
				t.Errorf("the error holds a secret: %v", err)
			}
		})
	}
}

// An entry without a scheme is https. Without any entry, Tailscale's own repository is
// asked.
func TestProxyURLs(t *testing.T) {
	for goProxy, want := range map[string]string{
		"":                        "https://api.github.com/repos/tailscale/tailscale/releases/latest",
		" , ":                     "https://api.github.com/repos/tailscale/tailscale/releases/latest",
		"goproxy.example/a":       "https://goproxy.example/a/tailscale.com/@v/list",
		"http://goproxy.example/": "http://goproxy.example/tailscale.com/@v/list",
	} {
		a := New(Build{}, goProxy)
		var asked []string
		a.client.Transport = roundTripper(func(r *http.Request) (*http.Response, error) {
			asked = append(asked, r.URL.String())
			body := versions
			if r.URL.Host == "api.github.com" {
				body = `{"tag_name":"v1.104.9"}`
			}
			return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader(body))}, nil
		})
		if _, err := a.Ask(t.Context()); err != nil || len(asked) != 1 || asked[0] != want {
			t.Errorf("%q asks %q, %v; want %q", goProxy, asked, err, want)
		}
	}
}

// A build of nobody's repository, without GOPROXY, follows Tailscale's releases.
func TestTailscaleOnGitHub(t *testing.T) {
	for name, tt := range map[string]struct {
		answer http.HandlerFunc
		newer  bool
		want   string
	}{
		"newer":     {text(http.StatusOK, `{"tag_name":"v1.104.9"}`), true, "tailscale.com v1.104.9 is out (here: v1.104.7); take a newer release of derpd, or run `make upstream` in its sources"},
		"same":      {text(http.StatusOK, `{"tag_name":"v1.104.7"}`), false, "tailscale.com v1.104.7 is the newest release"},
		"unstable":  {text(http.StatusOK, `{"tag_name":"v1.105.3"}`), false, `/repos/tailscale/tailscale/releases/latest: the latest release is not a stable one of Tailscale (got tag "v1.105.3"); set GOPROXY`},
		"forbidden": {text(http.StatusForbidden, ""), false, "answered 403 Forbidden; try again later, or set HTTPS_PROXY if GitHub cannot be reached from here; or set GOPROXY"},
	} {
		t.Run(name, func(t *testing.T) {
			a := New(Build{Version: "dev", Upstream: "v1.104.7"}, "")
			a.github = server(t, tt.answer)
			assertAnswer(t, a, tt.newer, tt.want)
		})
	}
}

// A published build that GitHub does not answer names the variable that it lacks.
func TestNoGOPROXY(t *testing.T) {
	a := New(Build{Version: "1.104.7-1", Upstream: "v1.104.7", Source: "https://github.com/someone/derpd"}, "")
	a.github = server(t, text(http.StatusForbidden, ""))
	assertAnswer(t, a, false, "; then GOPROXY: is not set; set GOPROXY to a module proxy")
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestOnGitHub(t *testing.T) {
	for source, want := range map[string]string{
		"https://github.com/someone/derpd":          "someone/derpd",
		"https://github.com/someone/derpd/":         "someone/derpd",
		"https://github.com/someone/derpd.git":      "someone/derpd",
		"https://github.com/someone":                "",
		"https://github.com/someone/derpd/tree/dev": "",
		"https://git.example.com/someone/derpd":     "",
		"":                                          "",
	} {
		if got, ok := onGitHub(source); ok != (want != "") || ok && got != want {
			t.Errorf("%q: %q, %t", source, got, ok)
		}
	}
}
