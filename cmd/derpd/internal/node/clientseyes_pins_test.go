package node

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"time"

	"derpd/certs"
	"derpd/internal/testkit"
)

func noNames(c *x509.Certificate) { c.DNSNames = nil }

// serves waits until the relay has taken new files.
func (w *world) serves(next *tls.Certificate) {
	w.Helper()
	testkit.Until(w, "the relay has the new certificate", func() bool {
		leaf := w.node.certs.Status().Leaf
		return leaf != nil && leaf.Equal(next.Leaf)
	})
}

// pinned sets mode pinned, with the file in [world.dir].
func (w *world) pinned() certs.PinnedConfig {
	w.set("DERP_CERT_DIR=" + w.dir)
	return certs.PinnedConfig{Path: filepath.Join(w.dir, "pinned.pem"), Names: []string{eyesName}}
}

// rotate makes a pinned certificate that begins at a time.
func (w *world) rotate(c certs.PinnedConfig, begin time.Time) {
	w.Helper()
	if err := certs.RotatePinned(c, begin); err != nil {
		w.Fatal(err)
	}
}

// pinRows are about maps with the hash of a self-signed certificate.
func pinRows() []situation {
	return []situation{
		{name: "nothing set but an address", begin: func(w *world) { w.env = nil }},
		{name: "a pin for a name", begin: func(w *world) { w.pinned() }},
		{name: "a self-signed file", begin: func(w *world) { w.manual(w.leaf(nil)) }},
		{
			// With a pin, clients do not look at the key usage.
			name:  "a self-signed file for clients alone",
			begin: func(w *world) { w.manual(w.leaf(nil, usage(x509.ExtKeyUsageClientAuth))) },
		},
		{
			// Clients that dial an address verify no name.
			name: "another address than that of the pinned certificate",
			begin: func(w *world) {
				c := w.pinned()
				c.Names = []string{"198.18.0.1"}
				w.rotate(c, time.Now())
				w.set("DERP_DOMAIN=")
			},
		},
		{
			name: "a pinned certificate without any name",
			begin: func(w *world) {
				made := w.leaf(nil, with(noNames), until(time.Now().AddDate(2, 0, 0)))
				c := w.pinned()
				w.set("DERP_DOMAIN=")
				testkit.WritePair(w, c.Path, filepath.Join(w.dir, "key"), made)
				if err := os.WriteFile(c.Path, append(testkit.ChainPEM(made), testkit.KeyPEM(w, made)...), 0o600); err != nil {
					w.Fatal(err)
				}
			},
		},
		{
			name:  "a pin that the operator rotates",
			begin: func(w *world) { w.pinned() },
			then: func(w *world) {
				before := w.node.certs.Status().Pin
				w.rotate(certs.PinnedConfig{Path: filepath.Join(w.dir, "pinned.pem"), Names: []string{eyesName}}, time.Now())
				testkit.Until(w, "the new pin is served", func() bool { return w.node.certs.Status().Pin != before })
			},
		},
		everywhere("the certificate of derp.example.com expired on ", situation{
			name:   "a pinned certificate that expires while the relay runs",
			begin:  func(w *world) { w.rotate(w.pinned(), soon().AddDate(-10, 0, 0)) },
			client: "cert expired",
		}),
		everywhere("the certificate of derp.example.com expired on ", situation{
			name:   "a self-signed file that expires while the relay runs",
			begin:  func(w *world) { w.manual(w.leaf(nil, until(soon()))) },
			client: "cert expired",
		}),
		{
			name:  "a pinned certificate that expired",
			begin: func(w *world) { w.rotate(w.pinned(), time.Now().AddDate(-11, 0, 0)) },
			start: "expired on",
		},
		{
			name: "a pinned certificate of another name",
			begin: func(w *world) {
				c := w.pinned()
				c.Names = []string{"other.example.com"}
				w.rotate(c, time.Now())
			},
			start: "covers other.example.com, not derp.example.com",
		},
		{
			name: "a pinned certificate that is lost",
			begin: func(w *world) {
				c := w.pinned()
				w.rotate(c, time.Now())
				if err := os.Remove(c.Path); err != nil {
					w.Fatal(err)
				}
			},
			start: "is lost: clients expect sha256-raw:",
		},
		{
			name: "a pinned certificate that is damaged",
			begin: func(w *world) {
				c := w.pinned()
				w.rotate(c, time.Now())
				if err := os.WriteFile(c.Path, []byte("x"), 0o600); err != nil {
					w.Fatal(err)
				}
			},
			start: "is damaged",
		},
	}
}
