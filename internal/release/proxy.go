package release

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/mod/semver"
)

const howToSetProxy = "set GOPROXY to a module proxy that can be reached from here, or HTTPS_PROXY"

// askProxies asks the module proxies of GOPROXY for the versions of tailscale.com, in
// the order of go.dev/ref/mod#goproxy-protocol. A proxy after a comma is asked if the one
// before has no such module, and a proxy after a pipe after any failure. limit is the
// time for all of them.
func (a *Asker) askProxies(ctx context.Context, limit time.Duration) (Answer, error) {
	list := a.goProxy
	if list == "" {
		return Answer{}, errors.New("GOPROXY: is not set; " + howToSetProxy)
	}
	// One proxy that does not answer leaves time for the others.
	share := limit / time.Duration(1+strings.Count(list, ",")+strings.Count(list, "|"))
	var failures []string
	for list != "" {
		entry, next := list, ""
		separator := byte(',')
		if i := strings.IndexAny(list, ",|"); i >= 0 {
			entry, separator, next = list[:i], list[i], list[i+1:]
		}
		list = next
		entry = strings.TrimSpace(entry)
		switch entry {
		case "":
			continue
		case "off", "direct":
			failures = append(failures, entry+" names no proxy to ask")
			list = ""
			continue
		}
		answer, shown, err := a.askProxy(ctx, entry, share)
		if err == nil {
			return answer, nil
		}
		failures = append(failures, fmt.Sprintf("%s: %v", shown, err))
		if separator == ',' && !hasNoModule(err) {
			break
		}
	}
	return Answer{}, fmt.Errorf("GOPROXY: %s; %s", strings.Join(failures, ", then "), howToSetProxy)
}

// hasNoModule reports whether a proxy answered that it has no such module.
func hasNoModule(err error) bool {
	answer, ok := errors.AsType[*statusError](err)
	return ok && (answer.status == http.StatusNotFound || answer.status == http.StatusGone)
}

// askProxy asks one module proxy. Shown is its URL without user, path and query,
// which may hold secrets.
func (a *Asker) askProxy(ctx context.Context, proxy string, limit time.Duration) (answer Answer, shown string, err error) {
	// As the go command does.
	if strings.ContainsAny(proxy, ".:/") && !strings.Contains(proxy, ":/") && !strings.HasPrefix(proxy, "/") {
		proxy = "https://" + proxy
	}
	u, err := url.Parse(proxy)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return Answer{}, "an entry", errors.New("not an http or https URL")
	}
	shown = u.Scheme + "://" + u.Host
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	body, err := a.get(ctx, u.JoinPath(Module, "@v", "list").String())
	if err != nil {
		return Answer{}, shown, err
	}
	newest := Newest(strings.Fields(string(body)), true)
	if newest == "" {
		return Answer{}, shown, fmt.Errorf("its answer has no stable version of %s", Module)
	}
	return a.comparedTailscale(newest), shown, nil
}

// comparedTailscale returns the answer for the newest version of Tailscale.
func (a *Asker) comparedTailscale(newest string) Answer {
	here := a.build.Upstream
	return compared(Module, newest, here, semver.IsValid(here) && semver.Compare(newest, here) > 0,
		"take a newer release of derpd, or run `make upstream` in its sources")
}
