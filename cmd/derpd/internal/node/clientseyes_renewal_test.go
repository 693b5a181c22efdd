package node

import (
	"errors"
	"os"
	"strings"
	"time"

	"derpd/internal/testkit"
)

// renewalRows are about files of mode manual that change while the relay runs.
func renewalRows() []situation {
	// A bad file leaves the old certificate in use.
	bad := func(name, words string, then func(*world)) situation {
		return situation{
			name: "a renewal with " + name, health: words, log: words, then: then,
			begin: func(w *world) { w.manual(w.chain(publicRoot)...) },
		}
	}
	return []situation{
		{
			name:  "a renewal",
			begin: func(w *world) { w.manual(w.chain(publicRoot, until(time.Now().AddDate(0, 0, 20)))...) },
			then: func(w *world) {
				next := w.chain(publicRoot)
				w.replace(next...)
				w.serves(next[0])
			},
		},
		everywhere(`clients need "Private Root" installed`, situation{
			name:  "a renewal by another authority",
			begin: func(w *world) { w.manual(w.chain(publicRoot)...) },
			then: func(w *world) {
				root := rootNamed(w, "Private Root")
				w.replace(append(w.chain(root), root)...)
			},
			client: "certificate signed by unknown authority", lacks: "Private Root",
		}),
		{
			name:  "a renewal for another name",
			begin: func(w *world) { w.manual(w.chain(publicRoot)...) },
			then:  func(w *world) { w.replace(w.chain(publicRoot, forNames("other.example.com"))...) },
			// The old certificate is served.
			health: "the new files are invalid", log: "certificate files are invalid",
		},
		bad("the new certificate and the old key", "derp.example.com.key does not belong to ", func(w *world) {
			w.rewrite(".crt", func([]byte) []byte { return testkit.ChainPEM(w.chain(publicRoot)...) })
		}),
		bad("the new key and the old certificate", "derp.example.com.key does not belong to ", func(w *world) {
			w.rewrite(".key", func([]byte) []byte { return testkit.KeyPEM(w, w.leaf(publicRoot)) })
		}),
		{
			name:  "a renewal of one file after the other",
			begin: func(w *world) { w.manual(w.chain(publicRoot)...) },
			then: func(w *world) {
				next := w.chain(publicRoot)
				w.rewrite(".crt", func([]byte) []byte { return testkit.ChainPEM(next...) })
				w.says("does not belong to")
				w.rewrite(".key", func([]byte) []byte { return testkit.KeyPEM(w, next[0]) })
				w.serves(next[0])
			},
		},
		bad("no issuer", `the certificate of "CN=Intermediate", which signed CN=derp.example.com, is missing`, func(w *world) {
			w.replace(w.chain(publicRoot, with(fetchable))[0])
		}),
		bad("a file in DER", "is a certificate in DER form", func(w *world) { w.openssl(".crt", "x509", "-outform", "der") }),
		bad("an empty file", "derp.example.com.crt is empty", func(w *world) { w.rewrite(".crt", func([]byte) []byte { return nil }) }),
		bad("a key with a passphrase", "derp.example.com.key has a passphrase", func(w *world) { w.openssl(".key", "pkey", "-aes256", "-passout", "pass:x") }),
		bad("an expired certificate", "derp.example.com.crt expired on ", func(w *world) { w.replace(w.chain(publicRoot, until(time.Now().Add(-time.Minute)))...) }),
		bad("files that are removed", "no such file", func(w *world) {
			if err := errors.Join(os.Remove(w.path(".crt")), os.Remove(w.path(".key"))); err != nil {
				w.Fatal(err)
			}
		}),
		bad("a directory in the place of the file", "is a directory", func(w *world) {
			if err := errors.Join(os.Remove(w.path(".crt")), os.Mkdir(w.path(".crt"), 0o700)); err != nil {
				w.Fatal(err)
			}
		}),
		{
			// The cause has what is wrong with the new files too.
			name:   "bad files, and the old certificate expires",
			begin:  func(w *world) { w.manual(w.chain(publicRoot, until(soon()))...) },
			then:   func(w *world) { w.rewrite(".key", withMark) },
			client: "certificate has expired", health: "has a byte order mark", log: "has a byte order mark",
		},
		{
			name: "files that nobody renews",
			begin: func(w *world) {
				w.manual(w.chain(publicRoot, from(time.Now().AddDate(0, 0, -80)), until(time.Now().AddDate(0, 0, 10)))...)
			},
			health: "renew the files",
		},
		{
			name: "a new certificate of six days",
			begin: func(w *world) {
				w.manual(w.chain(publicRoot, from(time.Now().Add(-time.Hour)), until(time.Now().Add(sixDays-time.Hour)))...)
			},
		},
		{
			name: "an old certificate of six days",
			begin: func(w *world) {
				w.manual(w.chain(publicRoot, from(time.Now().Add(30*time.Hour-sixDays)), until(time.Now().Add(30*time.Hour)))...)
			},
			health: "renew the files",
		},
	}
}

// says waits until health says words.
func (w *world) says(words string) {
	w.Helper()
	testkit.Until(w, "health says "+words, func() bool {
		return strings.Contains(experience{report: w.node.health.Report(w.Context())}.says(), words)
	})
}
