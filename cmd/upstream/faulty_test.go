package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
)

// hangs, in place of a status, means that no answer ever comes.
const hangs = 0

// faults are what module proxies answered to requests for these paths, by name.
var faults = map[string]struct {
	path   string // prefix of the paths with the fault
	status int
}{
	"source-403":      {"/example.com/tunnel/@v/v1.1.0.zip", http.StatusForbidden},
	"source-404":      {"/example.com/tunnel/@v/v1.1.0.zip", http.StatusNotFound},
	"source-hangs":    {"/example.com/tunnel/@v/v1.1.0.zip", hangs},
	"gomod-403":       {"/example.com/tunnel/@v/v1.1.0.", http.StatusForbidden},
	"gomod-404":       {"/example.com/tunnel/@v/v1.1.0.", http.StatusNotFound},
	"compiled-403":    {"/example.com/codec/@v/v1.1.0.zip", http.StatusForbidden},
	"compiled-hangs":  {"/example.com/codec/@v/v1.1.0.zip", hangs},
	"unserved":        {"/tailscale.com/@v/v1.104.0.", http.StatusNotFound},
	"unserved-source": {"/tailscale.com/@v/v1.104.0.zip", http.StatusNotFound},
	"toolchain-hangs": {"/golang.org/toolchain/", hangs},
	"hangs":           {"/", hangs},
}

// startFaulty returns the URL of a server. Below /NAME it passes requests on to a
// module proxy, except those with the fault of that name.
func startFaulty(t *testing.T, proxy string) string {
	t.Helper()
	target, err := url.Parse(proxy)
	if err != nil {
		t.Fatal(err)
	}
	next := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) }}
	closing := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, path, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
		r.URL.Path = "/" + path
		fault, ok := faults[name]
		switch {
		case !ok:
			http.Error(w, fmt.Sprintf("no fault has the name %q", name), http.StatusInternalServerError)
		case !strings.HasPrefix(r.URL.Path, fault.path):
			next.ServeHTTP(w, r)
		case fault.status == hangs:
			select {
			case <-r.Context().Done():
			case <-closing:
			}
		default:
			http.Error(w, "This module version is not available.", fault.status)
		}
	}))
	t.Cleanup(server.Close)
	t.Cleanup(func() { close(closing) })
	return server.URL
}
