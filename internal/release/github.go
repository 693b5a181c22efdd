package release

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/semver"
)

// onGitHub returns OWNER/NAME of a repository on GitHub.
func onGitHub(source string) (repository string, ok bool) {
	u, err := url.Parse(source)
	if err != nil || u.Host != "github.com" {
		return "", false
	}
	repository = strings.TrimSuffix(strings.Trim(u.Path, "/"), ".git")
	return repository, strings.Count(repository, "/") == 1
}

// latest returns the tag of the latest release of a repository, and the URL that was
// asked. The answer is the one of "Get the latest release" in GitHub's REST API.
func (a *Asker) latest(ctx context.Context, repository string) (tag, target string, err error) {
	target = a.github + "/repos/" + repository + "/releases/latest"
	body, err := a.get(ctx, target)
	if err != nil {
		return "", target, fmt.Errorf("%s: %w; %s", target, err, howToAskGitHub(err))
	}
	var latest struct {
		TagName string `json:"tag_name"`
	}
	if err := json.Unmarshal(body, &latest); err != nil {
		return "", target, fmt.Errorf("%s: not an answer of GitHub's API: %w; set HTTPS_PROXY if GitHub cannot be reached from here", target, err)
	}
	return latest.TagName, target, nil
}

// askTailscale asks for the latest release of Tailscale itself, where neither the
// repository of the build nor a module proxy is known.
func (a *Asker) askTailscale(ctx context.Context) (Answer, error) {
	tag, target, err := a.latest(ctx, "tailscale/tailscale")
	switch {
	case err != nil:
		return Answer{}, fmt.Errorf("%w; or %s", err, howToSetProxy)
	case Newest([]string{tag}, true) == "":
		return Answer{}, fmt.Errorf("%s: the latest release is not a stable one of Tailscale (got tag %.40q); %s", target, tag, howToSetProxy)
	}
	return a.comparedTailscale(tag), nil
}

// askGitHub asks for the latest release of the build's repository.
func (a *Asker) askGitHub(ctx context.Context, repository string) (Answer, error) {
	tag, target, err := a.latest(ctx, repository)
	if err != nil {
		return Answer{}, err
	}
	newest := strings.TrimPrefix(tag, "v")
	if !Name.MatchString(newest) {
		return Answer{}, fmt.Errorf("%s: the latest release is not one of derpd (got tag %.40q); build derpd with the SOURCE of its own repository", target, tag)
	}
	here := strings.TrimPrefix(a.build.Version, "v")
	var newer bool
	if Name.MatchString(here) {
		// As a pre-release the last number is compared as a number, too.
		newer = semver.Compare("v"+newest, "v"+here) > 0
	} else {
		here = "development build " + a.build.Version
		upstream, _, _ := strings.Cut(newest, "-")
		newer = semver.IsValid(a.build.Upstream) && semver.Compare("v"+upstream, a.build.Upstream) > 0
	}
	return compared("derpd", newest, here, newer,
		"pull its image, or take its archive from https://github.com/"+repository+"/releases"), nil
}

// howToAskGitHub is the fix for an error of the request.
func howToAskGitHub(err error) string {
	const later = "try again later, or set HTTPS_PROXY if GitHub cannot be reached from here"
	answer, ok := errors.AsType[*statusError](err)
	switch {
	case !ok:
		return later
	case answer.status == http.StatusNotFound:
		return "the repository has no release, or is not public"
	case answer.status == http.StatusTooManyRequests, answer.header.Get("X-RateLimit-Remaining") == "0":
		// Without a login, GitHub allows 60 requests per hour and address.
		if reset, err := strconv.ParseInt(answer.header.Get("X-RateLimit-Reset"), 10, 64); err == nil {
			return "too many requests from this address; try again after " + time.Unix(reset, 0).UTC().Format("15:04 UTC")
		}
		return "too many requests from this address; try again in an hour"
	}
	return later
}
