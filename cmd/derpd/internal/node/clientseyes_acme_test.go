package node

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"

	"derpd/internal/testkit"
	"derpd/internal/testkit/acmetest"
)

// noAuthority is the directory of an authority that does not answer.
const noAuthority = "https://127.0.0.1:1/dir"

// renewed sets an ACME authority that is down, and stores a certificate that it issued
// for a lifetime that ends so much later. The name is a fresh one: certmagic keeps the
// pauses after failures by name, for all relays of the process.
func (w *world) renewed(lifetime, left time.Duration) {
	w.Helper()
	name, end := freshName("eyes"), time.Now().Add(left)
	chain := w.chain(publicRoot, forNames(name), from(end.Add(-lifetime)), until(end))
	w.set("DERP_CERT_MODE=letsencrypt", "DERP_DOMAIN="+name, "DERP_ACME_CA="+noAuthority, "DERP_CERT_DIR="+w.dir)
	base := strings.TrimSuffix(certmagic.StorageKeys.SiteCert((&certmagic.ACMEIssuer{CA: noAuthority}).IssuerKey(), name), ".crt")
	if err := os.MkdirAll(filepath.Dir(filepath.Join(w.dir, base)), 0o700); err != nil {
		w.Fatal(err)
	}
	w.keep(base+".pem", slices.Concat(testkit.ChainPEM(chain...), testkit.KeyPEM(w, chain[0])))
	w.keep(base+".json", fmt.Appendf(nil, `{"sans":[%q]}`, name))
}

// acmeRows are about authorities that issue by ACME. The authorities start before the
// rows, because they set the environment of the process.
func acmeRows(t *testing.T) []situation {
	t.Helper()
	private := func(validity time.Duration) (*acmetest.CA, func(*world)) {
		ca, httpPort, tlsPort := acmetest.Start(t), testkit.FreePort(t), testkit.FreePort(t)
		ca.Validity = validity
		ca.Validate(t, httpPort, tlsPort)
		return ca, func(w *world) {
			w.set("DERP_CERT_MODE=letsencrypt", "DERP_ACME_CA="+ca.Directory, "DERP_ACME_CA_ROOTS="+ca.RootsFile,
				fmt.Sprintf("DERP_HTTP_PORT=%d", httpPort), fmt.Sprintf("DERP_ADDR=127.0.0.1:%d", tlsPort))
		}
	}
	first, beginFirst := private(0)
	_, beginSecond := private(sixDays)
	return []situation{
		everywhere(`clients need "Pebble Root CA `, situation{
			name: "a private ACME authority that the client knows",
			begin: func(w *world) {
				beginFirst(w)
				w.client.AddCert(first.Root())
			},
		}),
		everywhere(`clients need "Pebble Root CA `, situation{
			name: "a private ACME authority that the client does not know", begin: beginSecond,
			client: "certificate signed by unknown authority", lacks: "Pebble Root CA ",
		}),
		{
			name:   "an ACME authority that is down",
			begin:  func(w *world) { w.set("DERP_CERT_MODE=letsencrypt", "DERP_ACME_CA="+noAuthority) },
			client: "tls: ", health: "waiting for derp.example.com", log: "connection refused",
		},
		{name: "a new ACME certificate of six days", begin: func(w *world) { w.renewed(sixDays, sixDays-time.Hour) }},
		{
			name:   "an old ACME certificate of six days, whose renewal fails",
			begin:  func(w *world) { w.renewed(sixDays, 30*time.Hour) },
			health: "connection refused", log: "connection refused",
		},
		{
			name:   "an ACME certificate that expires because its renewal fails",
			begin:  func(w *world) { w.renewed(90*day, time.Until(soon())) },
			client: "certificate has expired", health: "connection refused", log: "expired on ",
		},
		{
			name:   "an ACME certificate that expired while the relay was stopped",
			begin:  func(w *world) { w.renewed(sixDays, -time.Hour) },
			client: "certificate has expired", health: "connection refused", log: "connection refused",
		},
	}
}

// sixDays is the lifetime of a short-lived certificate (Let's Encrypt's profile
// shortlived).
const sixDays = 160 * time.Hour
