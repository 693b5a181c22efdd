package relay

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"

	"tailscale.com/tailcfg"
)

// admissionScheme is the scheme of URLs that lead to an AdmitFunc. derpserver
// sends an admission request only as a POST to a URL, through
// http.DefaultClient. This private scheme on http.DefaultTransport keeps the
// request inside the process.
const admissionScheme = "derpd-admission"

// admissions serves the private scheme. It is global because
// http.DefaultTransport is global, and accepts a scheme only once.
var admissions admissionTransport

type admissionTransport struct {
	register sync.Once

	mu    sync.Mutex
	funcs []AdmitFunc // the index is the URL's host; guarded by mu
}

// admissionURL returns a URL for derpserver's admission requests (derper's
// --verify-client-url). Admit decides about each request.
func admissionURL(admit AdmitFunc) string {
	admissions.register.Do(func() {
		http.DefaultTransport.(*http.Transport).RegisterProtocol(admissionScheme, &admissions)
	})
	admissions.mu.Lock()
	defer admissions.mu.Unlock()
	admissions.funcs = append(admissions.funcs, admit)
	return fmt.Sprintf("%s://%d/", admissionScheme, len(admissions.funcs)-1)
}

// RoundTrip implements [http.RoundTripper].
func (t *admissionTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	defer func() { _ = req.Body.Close() }()
	admit, err := t.find(req.URL.Host)
	if err != nil {
		return nil, err
	}
	var question tailcfg.DERPAdmitClientRequest
	if err := json.NewDecoder(req.Body).Decode(&question); err != nil {
		return nil, fmt.Errorf("reading admission request: %w", err)
	}
	if err := admit(req.Context(), question.NodePublic, question.Source); err != nil {
		return nil, err
	}
	answer, err := json.Marshal(tailcfg.DERPAdmitClientResponse{Allow: true})
	if err != nil {
		return nil, err
	}
	return &http.Response{
		Status:     "200 OK",
		StatusCode: http.StatusOK,
		Proto:      "HTTP/1.1",
		ProtoMajor: 1,
		ProtoMinor: 1,
		Header:     make(http.Header),
		Body:       io.NopCloser(bytes.NewReader(answer)),
		Request:    req,
	}, nil
}

func (t *admissionTransport) find(host string) (AdmitFunc, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	i, err := strconv.Atoi(host)
	if err != nil || i < 0 || i >= len(t.funcs) {
		return nil, fmt.Errorf("no admission function %q", host)
	}
	return t.funcs[i], nil
}
