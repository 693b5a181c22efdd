package node

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"time"

	"derpd/certs"
	"derpd/cmd/derpd/internal/admin"
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

// waits replaces the files, and waits until the relay holds them back.
func (w *world) waits(next ...*tls.Certificate) {
	w.Helper()
	w.replace(next...)
	testkit.Until(w, "the new certificate waits", func() bool {
		waiting := w.node.certs.Status().Waiting
		return waiting != nil && waiting.Equal(next[0].Leaf)
	})
}

// accept is `derpd pin --accept`, and gives the clients the new map.
func (w *world) accept(next *tls.Certificate) {
	w.Helper()
	ask := admin.Client{Addr: w.node.listeners.admin.Addr().String()}
	if _, err := ask.AcceptPin(w.Context(), certs.ShortHash(next.Leaf), "json"); err != nil {
		w.Fatal(err)
	}
}

// waitingFiles is a row whose new files wait: clients work with the old certificate.
func waitingFiles(s situation) situation {
	s.health, s.log = "with which every client fails until it has a new map", "the certificate files need a new map"
	s.note = "not served yet and needs another map"
	return s
}

// pinChanged is a row after a change of the pin.
func pinChanged(s situation) situation {
	s.health, s.log, s.note = "clients need the new map", "the pin in the map has changed", "the pin changed on "
	return s
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

// livesSixDays sets a pinned certificate that lives for sixDays, of an age.
func (w *world) livesSixDays(age time.Duration) {
	w.Helper()
	begin := time.Now().Add(-age)
	c := w.leaf(nil, from(begin), until(begin.Add(sixDays)))
	w.pinned()
	w.keep("pinned.pem", slices.Concat(testkit.ChainPEM(c), testkit.KeyPEM(w, c)))
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
		pinChanged(situation{
			name:  "a pin that the operator rotates",
			begin: func(w *world) { w.pinned() },
			then: func(w *world) {
				before := w.node.certs.Status().Pin
				w.rotate(certs.PinnedConfig{Path: filepath.Join(w.dir, "pinned.pem"), Names: []string{eyesName}}, time.Now())
				testkit.Until(w, "the new pin is served", func() bool { return w.node.certs.Status().Pin != before })
			},
		}),
		waitingFiles(situation{
			name:  "a self-signed file that is replaced by another",
			begin: func(w *world) { w.manual(w.leaf(nil)) },
			then:  func(w *world) { w.waits(w.leaf(nil)) },
		}),
		waitingFiles(situation{
			name:  "a self-signed file that is replaced by an authority's",
			begin: func(w *world) { w.manual(w.leaf(nil)) },
			then:  func(w *world) { w.waits(w.chain(publicRoot)...) },
		}),
		waitingFiles(situation{
			name:  "an authority's file that is replaced by a self-signed one",
			begin: func(w *world) { w.manual(w.chain(publicRoot)...) },
			then:  func(w *world) { w.waits(w.leaf(nil)) },
		}),
		waitingFiles(situation{
			name:  "a pinned certificate that is replaced by hand",
			begin: func(w *world) { w.pinned() },
			then: func(w *world) {
				made := w.leaf(nil)
				if err := os.WriteFile(filepath.Join(w.dir, "pinned.pem"), append(testkit.ChainPEM(made), testkit.KeyPEM(w, made)...), 0o600); err != nil {
					w.Fatal(err)
				}
				testkit.Until(w, "the new certificate waits", func() bool { return w.node.certs.Status().Waiting != nil })
			},
		}),
		pinChanged(situation{
			name:  "a self-signed file that the operator accepts",
			begin: func(w *world) { w.manual(w.leaf(nil)) },
			then: func(w *world) {
				next := w.leaf(nil)
				w.waits(next)
				w.accept(next)
			},
		}),
		pinChanged(situation{
			name:  "an authority's file that the operator accepts in place of a self-signed one",
			begin: func(w *world) { w.manual(w.leaf(nil)) },
			then: func(w *world) {
				next := w.chain(publicRoot)
				w.waits(next...)
				w.accept(next[0])
			},
		}),
		pinChanged(situation{
			name:  "a self-signed file that expires while another one waits",
			begin: func(w *world) { w.manual(w.leaf(nil, until(soon()))) },
			then: func(w *world) {
				next := w.leaf(nil)
				w.replace(next)
				w.serves(next)
			},
		}),
		pinChanged(situation{
			name: "a self-signed file that is replaced before a restart",
			begin: func(w *world) {
				w.set("DERP_DATA_DIR=" + w.TempDir())
				w.manual(w.leaf(nil))
				begin(w.T, testkit.Environ(w, w.env...)).stop()
				w.replace(w.leaf(nil))
			},
		}),
		{name: "a new pinned certificate of six days", begin: func(w *world) { w.livesSixDays(time.Hour) }},
		{
			name:   "an old pinned certificate of six days",
			begin:  func(w *world) { w.livesSixDays(130 * time.Hour) },
			health: "make a new one with `derpd pin --rotate`",
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
