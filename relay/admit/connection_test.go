package admit

import (
	"context"
	"crypto/x509"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// Roots verify Tailscale's API and its tokens. The error about an unknown authority
// names the variable.
func TestTailnetRoots(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/token") {
			answer(w, http.StatusOK, `{"access_token":"t","token_type":"Bearer","expires_in":3600}`)
			return
		}
		answer(w, http.StatusOK, `{"devices":[]}`)
	}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(server.Close)
	base, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	for _, c := range []TailnetConfig{{APIKey: "tskey-api-1"}, {OAuthClientID: "id", OAuthClientSecret: "secret"}} {
		c.BaseURL = base
		api := newTailnetAPI(c)
		_, err := api.list(context.Background())
		if err == nil || !strings.HasSuffix(api.explain(err).Error(), "certificate signed by unknown authority; if the authority is a private one, set DERP_CA_ROOTS to its roots") {
			t.Errorf("without roots: %v", err)
		}
		c.Roots = roots
		if _, err := newTailnetAPI(c).list(context.Background()); err != nil {
			t.Errorf("with roots: %v", err)
		}
	}
}
