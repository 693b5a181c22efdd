package node

import (
	"crypto/x509"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"time"
	"unicode/utf16"

	"derpd/internal/testkit"
)

// rewrite changes the content of the certificate file or the key file.
func (w *world) rewrite(extension string, f func([]byte) []byte) {
	w.Helper()
	path := filepath.Join(w.dir, eyesName+extension)
	data, err := os.ReadFile(path)
	if err != nil {
		w.Fatal(err)
	}
	if err := os.WriteFile(path, f(data), 0o600); err != nil {
		w.Fatal(err)
	}
}

// openssl replaces a file by what openssl makes of it.
func (w *world) openssl(extension string, arguments ...string) {
	w.Helper()
	path := filepath.Join(w.dir, eyesName+extension)
	made := filepath.Join(w.TempDir(), "made")
	output(w.T, w.dir, nil, program(w.T, "openssl", "/usr/bin/openssl"), append(arguments, "-in", path, "-out", made)...)
	w.rewrite(extension, func([]byte) []byte {
		data, err := os.ReadFile(made)
		if err != nil {
			w.Fatal(err)
		}
		return data
	})
}

// fileRows are about the files of mode manual, as people bring them.
func fileRows() []situation {
	past := time.Now().Add(-time.Minute)
	refused := func(name, words string, begin func(*world)) situation {
		return situation{name: name, begin: begin, start: words}
	}
	return []situation{
		refused("no files", "DERP_CERT_FILE: ", func(w *world) { w.set("DERP_CERT_MODE=manual", "DERP_CERT_DIR="+w.dir) }),
		refused("an expired leaf", "/derp.example.com.crt expired on ", func(w *world) { w.manual(w.chain(publicRoot, until(past))...) }),
		refused("a leaf of tomorrow", "/derp.example.com.crt is not valid before ", func(w *world) { w.manual(w.chain(publicRoot, from(time.Now().Add(24*time.Hour)))...) }),
		refused("another name", "/derp.example.com.crt covers other.example.com, not derp.example.com", func(w *world) { w.manual(w.chain(publicRoot, forNames("other.example.com"))...) }),
		refused("a missing intermediate", `the certificate of "CN=Intermediate", which signed CN=derp.example.com, is missing`, func(w *world) { w.manual(w.chain(publicRoot, with(fetchable))[0]) }),
		refused("the issuer before the leaf", "DERP_CERT_FILE: ", func(w *world) {
			chain := w.chain(publicRoot)
			w.manual(chain...)
			w.rewrite(".crt", func([]byte) []byte { return testkit.ChainPEM(chain[1], chain[0]) })
		}),
		refused("a leaf for clients alone", "is not for servers", func(w *world) { w.manual(w.chain(publicRoot, usage(x509.ExtKeyUsageClientAuth))...) }),
		refused("an intermediate for clients alone", "is not for servers", func(w *world) {
			i := w.intermediate(publicRoot, usage(x509.ExtKeyUsageClientAuth))
			w.manual(w.leaf(i), i)
		}),
		refused("a leaf of a private authority for clients alone", "is not for servers", func(w *world) {
			w.manual(w.leaf(rootNamed(w, "Private Root"), usage(x509.ExtKeyUsageClientAuth)))
		}),
		refused("an intermediate that may not sign this name", "not permitted by any constraint", func(w *world) {
			i := w.intermediate(publicRoot, with(func(c *x509.Certificate) {
				c.PermittedDNSDomains, c.PermittedDNSDomainsCritical = []string{"example.org"}, true
			}))
			w.manual(w.leaf(i), i, publicRoot)
		}),
		refused("an intermediate below one that allows none", "too many intermediates", func(w *world) {
			upper := w.intermediate(publicRoot, forNames("Upper"), with(func(c *x509.Certificate) { c.MaxPathLenZero = true }))
			lower := w.intermediate(upper)
			w.manual(w.leaf(lower), lower, upper, publicRoot)
		}),
		refused("two blocks on one line", "DERP_CERT_FILE: ", func(w *world) {
			w.manual(w.chain(publicRoot)...)
			w.rewrite(".crt", func(pem []byte) []byte {
				return slices.Concat(pem[:len(pem)/4], []byte("-----END CERTIFICATE----------BEGIN CERTIFICATE-----"), pem[len(pem)/4:])
			})
		}),
		refused("UTF-16", "DERP_CERT_FILE: ", func(w *world) {
			w.manual(w.chain(publicRoot)...)
			w.rewrite(".crt", func(pem []byte) (wide []byte) {
				for _, unit := range utf16.Encode([]rune("\ufeff" + string(pem))) {
					wide = binary.LittleEndian.AppendUint16(wide, unit)
				}
				return wide
			})
		}),
		refused("DER", "DERP_CERT_FILE: ", func(w *world) {
			w.manual(w.leaf(publicRoot))
			w.openssl(".crt", "x509", "-outform", "der")
		}),
		refused("PFX", "DERP_CERT_FILE: ", func(w *world) {
			w.manual(w.leaf(publicRoot))
			w.openssl(".crt", "pkcs12", "-export", "-passout", "pass:x", "-inkey", filepath.Join(w.dir, eyesName+".key"))
		}),
		refused("a key with a passphrase", "DERP_CERT_FILE: ", func(w *world) {
			w.manual(w.leaf(publicRoot))
			w.openssl(".key", "pkey", "-aes256", "-passout", "pass:x")
		}),
		refused("another certificate's key", "does not belong to ", func(w *world) {
			w.manual(w.leaf(publicRoot))
			w.rewrite(".key", func([]byte) []byte { return testkit.KeyPEM(w, w.leaf(publicRoot)) })
		}),
		refused("a name in the common name alone", "DERP_CERT_FILE: ", func(w *world) {
			w.manual(w.leaf(nil, forNames(eyesName), with(noNames)))
		}),
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
		{
			name: "files that nobody renews",
			begin: func(w *world) {
				w.manual(w.chain(publicRoot, from(time.Now().AddDate(0, 0, -80)), until(time.Now().AddDate(0, 0, 10)))...)
			},
			health: "renew the files",
		},
	}
}
