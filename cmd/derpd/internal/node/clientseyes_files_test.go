package node

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode/utf16"

	"derpd/internal/testkit"
)

// path is the path of the certificate file or the key file.
func (w *world) path(extension string) string { return filepath.Join(w.dir, eyesName+extension) }

// rewrite changes the content of the certificate file or the key file.
func (w *world) rewrite(extension string, f func([]byte) []byte) {
	w.Helper()
	data, err := os.ReadFile(w.path(extension))
	if err != nil {
		w.Fatal(err)
	}
	if err := os.WriteFile(w.path(extension), f(data), 0o600); err != nil {
		w.Fatal(err)
	}
}

// openssl replaces a file by what openssl makes of it.
func (w *world) openssl(extension string, arguments ...string) {
	w.Helper()
	made := filepath.Join(w.TempDir(), "made")
	output(w.T, w.dir, nil, program(w.T, "openssl", "/usr/bin/openssl"), append(arguments, "-in", w.path(extension), "-out", made)...)
	w.rewrite(extension, func([]byte) []byte {
		data, err := os.ReadFile(made)
		if err != nil {
			w.Fatal(err)
		}
		return data
	})
}

var commands = regexp.MustCompile("`([^`]*)`")

// byItsCommands runs the commands in an error, without a terminal. The passphrase is
// x, and an HTTP proxy answers every download with the certificate in the file
// "issuer".
func byItsCommands(w *world, err error) {
	w.Helper()
	proxy := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		http.ServeFile(rw, r, filepath.Join(w.dir, "issuer"))
	}))
	defer proxy.Close()
	found := commands.FindAllStringSubmatch(err.Error(), -1)
	if len(found) == 0 {
		w.Fatalf("no command in %v", err)
	}
	for _, command := range found {
		run := exec.CommandContext(w.Context(), "sh", "-c", command[1])
		run.Dir, run.Stdin = w.dir, strings.NewReader("x\n")
		run.Env = append(os.Environ(), "http_proxy="+proxy.URL)
		run.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if out, err := run.CombinedOutput(); err != nil {
			w.Fatalf("%s: %v\n%s", command[1], err, out)
		}
	}
}

// wide encodes a file as Windows PowerShell 5 does.
func wide(pem []byte) (encoded []byte) {
	for _, unit := range utf16.Encode([]rune("\ufeff" + string(pem))) {
		encoded = binary.LittleEndian.AppendUint16(encoded, unit)
	}
	return encoded
}

func withMark(pem []byte) []byte { return append([]byte("\ufeff"), pem...) }

// onOneLine joins two blocks, as cat does with a file without a last line end.
func onOneLine(pem []byte) []byte {
	return []byte(strings.ReplaceAll(string(pem), "-----\n-----", "----------"))
}

// fileRows are about the files of mode manual, as people bring them.
func fileRows() []situation {
	past := time.Now().Add(-time.Minute)
	refused := func(name, words string, begin func(*world)) situation {
		return situation{name: name, begin: begin, start: words}
	}
	mended := func(name, words string, begin func(*world)) situation {
		return situation{name: name, begin: begin, start: words, mend: byItsCommands}
	}
	return slices.Concat(renewalRows(), []situation{
		refused("no files", "DERP_CERT_FILE: ", func(w *world) { w.set("DERP_CERT_MODE=manual", "DERP_CERT_DIR="+w.dir) }),
		refused("an expired leaf", "/derp.example.com.crt expired on ", func(w *world) { w.manual(w.chain(publicRoot, until(past))...) }),
		refused("a leaf of tomorrow", "/derp.example.com.crt is not valid before ", func(w *world) { w.manual(w.chain(publicRoot, from(time.Now().Add(24*time.Hour)))...) }),
		refused("another name", "/derp.example.com.crt covers other.example.com, not derp.example.com", func(w *world) { w.manual(w.chain(publicRoot, forNames("other.example.com"))...) }),
		refused("a wildcard for a name below", "a wildcard stands for exactly one label", func(w *world) { w.manual(w.chain(publicRoot, forNames("*.com"))...) }),
		refused("an issuer that is no authority", "is not the certificate of an authority (basicConstraints CA:TRUE)", func(w *world) {
			i := w.leaf(publicRoot, forNames("Intermediate"))
			w.manual(w.leaf(i), i)
		}),
		refused("an issuer that has expired", `derp.example.com.crt (CN=Intermediate), which signed the certificate or its issuer, expired on `, func(w *world) {
			i := w.intermediate(publicRoot, until(past))
			w.manual(w.leaf(i), i)
		}),
		mended("a missing intermediate", `the certificate of "CN=Intermediate", which signed CN=derp.example.com, is missing; append it to the file: `, func(w *world) {
			chain := w.chain(publicRoot, with(fetchable))
			w.manual(chain[0])
			w.keep("issuer", chain[1].Certificate[0])
		}),
		mended("the issuer before the leaf", "derp.example.com.crt is the leaf's; put it first, before CN=Intermediate", func(w *world) {
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
		mended("two blocks on one line", "block 2 of ", func(w *world) {
			w.manual(w.chain(publicRoot)...)
			w.rewrite(".crt", onOneLine)
		}),
		mended("a byte order mark", "derp.example.com.crt has a byte order mark; run `", func(w *world) {
			w.manual(w.chain(publicRoot)...)
			w.rewrite(".crt", withMark)
		}),
		mended("a key with a byte order mark", "derp.example.com.key has a byte order mark; run `", func(w *world) {
			w.manual(w.chain(publicRoot)...)
			w.rewrite(".key", withMark)
		}),
		mended("UTF-16", "derp.example.com.crt is in UTF-16; run `iconv ", func(w *world) {
			w.manual(w.chain(publicRoot)...)
			w.rewrite(".crt", wide)
		}),
		mended("DER", "derp.example.com.crt is a certificate in DER form; run `openssl x509 ", func(w *world) {
			w.manual(w.leaf(publicRoot))
			w.openssl(".crt", "x509", "-outform", "der")
		}),
		mended("a key in DER", "derp.example.com.key is a private key in DER form; run `openssl pkey ", func(w *world) {
			w.manual(w.leaf(publicRoot))
			w.openssl(".key", "pkey", "-outform", "der")
		}),
		{
			name: "PFX",
			begin: func(w *world) {
				w.manual(w.leaf(publicRoot))
				w.openssl(".crt", "pkcs12", "-export", "-passout", "pass:x", "-inkey", w.path(".key"))
			},
			start: "derp.example.com.crt is PKCS#12 (PFX); run `openssl pkcs12 ",
			mend: func(w *world, err error) {
				byItsCommands(w, err)
				w.set("DERP_CERT_FILE="+w.path(".crt.pem"), "DERP_KEY_FILE="+w.path(".key.pem"))
			},
		},
		mended("a key with a passphrase", "derp.example.com.key has a passphrase; remove it with `openssl pkey ", func(w *world) {
			w.manual(w.leaf(publicRoot))
			w.openssl(".key", "pkey", "-aes256", "-passout", "pass:x")
		}),
		refused("another certificate's key", "does not belong to ", func(w *world) {
			w.manual(w.leaf(publicRoot))
			w.rewrite(".key", func([]byte) []byte { return testkit.KeyPEM(w, w.leaf(publicRoot)) })
		}),
		mended("a name in the common name alone", "names derp.example.com in its common name alone, which clients ignore; make it again with a subject alternative name: `openssl req -x509 ", func(w *world) {
			w.manual(w.leaf(nil, forNames(eyesName), with(noNames)))
		}),
		{
			name: "the key in the place of the certificate",
			begin: func(w *world) {
				w.manual(w.chain(publicRoot)...)
				w.swap()
			},
			start: "swap the two files",
			mend:  func(w *world, _ error) { w.swap() },
		},
		{
			name: "one file for the certificate and the key",
			begin: func(w *world) {
				chain := w.chain(publicRoot)
				w.manual(chain...)
				both := w.keep("both.pem", slices.Concat(testkit.KeyPEM(w, chain[0]), testkit.ChainPEM(chain...)))
				w.set("DERP_CERT_FILE="+both, "DERP_KEY_FILE="+both)
			},
		},
		{
			name: "a chain for a name in capitals",
			begin: func(w *world) {
				w.manual(w.chain(publicRoot)...)
				w.set("DERP_DOMAIN=DERP.Example.COM", "DERP_CERT_FILE="+w.path(".crt"), "DERP_KEY_FILE="+w.path(".key"))
			},
		},
		{
			name: "a chain for an address",
			begin: func(w *world) {
				w.manual(w.chain(publicRoot, forNames("127.0.0.1"))...)
				w.set("DERP_DOMAIN=127.0.0.1", "DERP_CERT_FILE="+w.path(".crt"), "DERP_KEY_FILE="+w.path(".key"))
			},
		},
		{
			name: "a self-signed file for an address",
			begin: func(w *world) {
				w.manual(w.leaf(nil, forNames("127.0.0.1")))
				w.set("DERP_DOMAIN=127.0.0.1", "DERP_CERT_FILE="+w.path(".crt"), "DERP_KEY_FILE="+w.path(".key"))
			},
		},
		{
			// Its subject is that of the leaf, which looks self-signed.
			name: "a leaf of an authority with the name of the relay",
			begin: func(w *world) {
				root := rootNamed(w, eyesName)
				w.client.AddCert(root.Leaf)
				w.manual(w.leaf(root))
			},
		},
		everywhere(`clients need "derp.example.com" installed`, situation{
			name: "a leaf and its authority with the name of the relay",
			begin: func(w *world) {
				root := rootNamed(w, eyesName)
				w.client.AddCert(root.Leaf)
				w.manual(w.leaf(root), root)
			},
		}),
		{
			name: "a key that TLS does not have",
			begin: func(w *world) {
				private, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
				if err != nil {
					w.Fatal(err)
				}
				w.manual(w.leaf(publicRoot, func(c *testkit.Certificate) { c.Key = private }))
			},
			start: "is a key that clients cannot use (ECDSA with P-224)",
		},
		{
			name: "a self-signed certificate and its copy",
			begin: func(w *world) {
				c := w.leaf(nil)
				w.manual(c, c)
			},
		},
		everywhere(`clients need "Private Root" installed: this machine does not know it`, situation{
			name: "a leaf of a private authority alone, which the client has",
			begin: func(w *world) {
				root := rootNamed(w, "Private Root")
				w.client.AddCert(root.Leaf)
				w.manual(w.leaf(root))
			},
		}),
		everywhere(`clients need "Private Root" installed: this machine does not know it`, situation{
			// As Active Directory's certificate services make it.
			name: "a leaf of a private authority alone, fetchable in its own network",
			begin: func(w *world) {
				root := rootNamed(w, "Private Root")
				w.client.AddCert(root.Leaf)
				w.manual(w.leaf(root, with(func(c *x509.Certificate) {
					c.IssuingCertificateURL = []string{"ldap:///CN=Private%20Root", "http://pki.corp.internal/root.crt"}
				})))
			},
		}),
		everywhere(`clients need "Private Root" installed: this machine does not know it`, situation{
			name:   "a leaf of a private authority alone, which the client lacks",
			begin:  func(w *world) { w.manual(w.leaf(rootNamed(w, "Private Root"))) },
			client: "certificate signed by unknown authority", lacks: "Private Root",
		}),
		onlyRoots("DERP_CA_ROOTS", "a root", func(w *world, root *tls.Certificate) {
			w.client.AddCert(root.Leaf)
			w.manual(w.leaf(root))
		}),
		onlyRoots("DERP_ACME_CA_ROOTS", "a root", func(w *world, root *tls.Certificate) {
			w.client.AddCert(root.Leaf)
			w.manual(w.chain(root)...)
		}),
		onlyRoots("DERP_CA_ROOTS", "an issuer of a leaf that says where it is", func(w *world, root *tls.Certificate) {
			w.client.AddCert(root.Leaf)
			w.manual(w.leaf(root, with(fetchable)))
		}),
	})
}

// onlyRoots is a row of a chain that only the roots in a variable complete.
func onlyRoots(variable, what string, begin func(w *world, root *tls.Certificate)) situation {
	return everywhere(`clients need "Private Root" installed: only `+variable+" has it", situation{
		name: what + " that only " + variable + " has",
		begin: func(w *world) {
			root := rootNamed(w, "Private Root")
			begin(w, root)
			w.set(variable + "=" + w.keep("roots.pem", testkit.ChainPEM(root)))
		},
	})
}

// keep writes a file, and returns its path.
func (w *world) keep(name string, data []byte) string {
	w.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		w.Fatal(err)
	}
	return path
}

// swap exchanges the certificate file and the key file.
func (w *world) swap() {
	w.Helper()
	for _, way := range [][2]string{{".crt", ".swap"}, {".key", ".crt"}, {".swap", ".key"}} {
		if err := os.Rename(w.path(way[0]), w.path(way[1])); err != nil {
			w.Fatal(err)
		}
	}
}
