package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"tailscale.com/types/key"
)

// clientTimeout is longer than a round of health checks may take.
const clientTimeout = 5 * time.Second

// maxAnswer bounds an answer of the admin listener, in bytes.
const maxAnswer = 4 << 20

// Client asks the running relay whose DERP_ADMIN_ADDR is Addr, host:port. An
// unspecified host means this machine.
type Client struct{ Addr string }

// NotDerpdError reports an answer that no derpd of this version gives: another
// program listens on the admin address.
type NotDerpdError struct{ Addr string }

// Error implements error.
func (e NotDerpdError) Error() string {
	return e.Addr + " is not a derpd, or is one of another version"
}

// Ready returns the health of the relay as text, and whether it is ready.
func (c Client) Ready(ctx context.Context) (report string, ready bool, err error) {
	status, _, body, err := c.ask(ctx, http.MethodGet, "/readyz")
	report = string(body)
	switch {
	case err != nil:
		return "", false, err
	case status == http.StatusOK && strings.HasPrefix(report, "ready\n"):
		return report, true, nil
	case status == http.StatusServiceUnavailable && strings.HasPrefix(report, "not ready"):
		return report, false, nil
	}
	return "", false, NotDerpdError(c)
}

// Map returns the map of the running relay in one of derpmap.Formats.
func (c Client) Map(ctx context.Context, format string) ([]byte, error) {
	status, contentType, body, err := c.ask(ctx, http.MethodGet, "/derpmap?format="+url.QueryEscape(format))
	switch {
	case err != nil:
		return nil, err
	case status != http.StatusOK || contentType != mapType:
		return nil, NotDerpdError(c)
	}
	return body, nil
}

// Admission returns the decision of the running relay about a node.
func (c Client) Admission(ctx context.Context, node key.NodePublic) (Admission, error) {
	status, contentType, body, err := c.ask(ctx, http.MethodGet, "/admit?node="+url.QueryEscape(node.String()))
	if err != nil {
		return Admission{}, err
	}
	if status == http.StatusTooManyRequests {
		return Admission{}, errors.New("the relay answers two such questions a second; ask again in a second")
	}
	var a Admission
	if status != http.StatusOK || contentType != admissionType || json.Unmarshal(body, &a) != nil {
		return Admission{}, NotDerpdError(c)
	}
	return a, nil
}

// AcceptPin orders the running relay to serve the certificate that waits, and returns
// the new map. A [RefusedError] is the relay's own.
func (c Client) AcceptPin(ctx context.Context, hash, format string) ([]byte, error) {
	status, contentType, body, err := c.ask(ctx, http.MethodPost, "/pin/accept?"+url.Values{"hash": {hash}, "format": {format}}.Encode())
	switch {
	case err != nil:
		return nil, err
	case status == http.StatusConflict && contentType == refusalType:
		return nil, RefusedError{strings.TrimSpace(string(body))}
	case status != http.StatusOK || contentType != mapType:
		return nil, NotDerpdError(c)
	}
	return body, nil
}

// ask sends a request to the admin listener, and reads the whole answer.
func (c Client) ask(ctx context.Context, method, path string) (status int, contentType string, body []byte, err error) {
	host, port, err := net.SplitHostPort(c.Addr)
	if err != nil {
		return 0, "", nil, err
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	ctx, cancel := context.WithTimeout(ctx, clientTimeout)
	defer cancel()
	// A URL has the zone of an IPv6 address with an escaped percent sign.
	at := url.URL{Scheme: "http", Host: net.JoinHostPort(host, port)}
	req, err := http.NewRequestWithContext(ctx, method, at.String()+path, http.NoBody)
	if err != nil {
		return 0, "", nil, err
	}
	req.Host = "localhost" // no browser sends it with another name; see guard
	if method == http.MethodPost {
		req.Header.Set("Content-Type", orderType)
	}
	// A transport of its own ignores proxies named in the environment.
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return 0, "", nil, errors.Unwrap(err) // without the URL
	}
	defer func() { _ = res.Body.Close() }()
	if body, err = io.ReadAll(io.LimitReader(res.Body, maxAnswer)); err != nil {
		return 0, "", nil, fmt.Errorf("reading the answer of %s: %w", c.Addr, err)
	}
	return res.StatusCode, res.Header.Get("Content-Type"), body, nil
}
