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

// derpserver asks about a client in one way only: it POSTs to an admission URL
// through http.DefaultClient. A private scheme on http.DefaultTransport keeps
// that question inside the process.
const admissionScheme = "derpd-admission"

// admissions is what answers the private scheme. It is global because
// http.DefaultTransport is, and a scheme can be registered there only once.
var admissions admissionTransport

type admissionTransport struct {
	register sync.Once

	mu    sync.Mutex
	funcs []AdmitFunc // guarded by mu; the index is the URL's host
}

// admissionURL returns a URL to which a POST in the protocol of derper's
// --verify-client-url is answered by admit.
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
