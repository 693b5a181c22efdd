package relay

import (
	"fmt"
	"net/http"
	"net/url"
)

// page is the text for people who open the address. Public scanners find open
// relays by the text of upstream's page, so this one differs.
const page = `<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Private service</title>
<p>This host carries traffic for a private network. There is nothing to see here.</p>
</html>
`

// Home returns the handler for the paths that clients never request. "blank" is
// an empty page and "page" a neutral one. An http or https URL is a redirect.
func Home(value string) (http.Handler, error) {
	switch value {
	case "blank":
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			w.WriteHeader(http.StatusOK)
		}), nil
	case "page":
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			_, _ = w.Write([]byte(page))
		}), nil
	}
	u, err := url.Parse(value)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		return nil, fmt.Errorf("want blank, page or an http(s) URL, got %q", value)
	}
	return http.RedirectHandler(value, http.StatusFound), nil
}
