package admit

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// maxAnswer bounds an admission answer, in bytes.
const maxAnswer = 4 << 10

// URL asks an admission URL in the protocol of derper's --verify-client-url,
// which Headscale's /verify speaks: a POST of tailcfg.DERPAdmitClientRequest,
// answered by tailcfg.DERPAdmitClientResponse.
func URL(target string) Source {
	client := &http.Client{
		// The answer to a POST must not come from somewhere else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return Source{
		Name: "url " + redacted(target),
		Ask: func(ctx context.Context, node key.NodePublic, addr netip.Addr) error {
			body, err := json.Marshal(tailcfg.DERPAdmitClientRequest{NodePublic: node, Source: addr})
			if err != nil {
				return err
			}
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, target, bytes.NewReader(body))
			if err != nil {
				return err
			}
			req.Header.Set("Content-Type", "application/json")
			res, err := client.Do(req)
			if err != nil {
				return err
			}
			defer func() { _ = res.Body.Close() }()
			if res.StatusCode != http.StatusOK {
				return fmt.Errorf("admission URL answered %s", res.Status)
			}
			return parseAnswer(io.LimitReader(res.Body, maxAnswer))
		},
	}
}

// parseAnswer takes only a JSON object that holds Allow for an answer: a login
// page or an empty object is neither a yes nor a no.
func parseAnswer(r io.Reader) error {
	var answer struct{ Allow *bool }
	if err := json.NewDecoder(r).Decode(&answer); err != nil {
		return fmt.Errorf("reading admission answer: %w", err)
	}
	switch {
	case answer.Allow == nil:
		return fmt.Errorf("admission answer holds no Allow")
	case !*answer.Allow:
		return ErrRefused
	}
	return nil
}

// redacted is target without what may be secret in it.
func redacted(target string) string {
	u, err := url.Parse(target)
	if err != nil {
		return "(unparsable)"
	}
	u.User, u.RawQuery, u.Fragment = nil, "", ""
	return u.String()
}
