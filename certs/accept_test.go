package certs_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"derpd/certs"
	"derpd/internal/testkit"
)

// held is a manager of files that a test replaces.
type held struct {
	served
	cert, key string
	log       *testkit.Buffer
	changed   []string // CertNames that clients need a new map for; read after Run has settled
}

// hold runs a manager whose files have a chain, in a bubble. Clients trust the other
// chains too, so that the certificate alone decides.
func hold(t *testing.T, first []*tls.Certificate, others ...[]*tls.Certificate) *held {
	t.Helper()
	dir := t.TempDir()
	h := &held{cert: filepath.Join(dir, "tls.crt"), key: filepath.Join(dir, "tls.key"), log: new(testkit.Buffer)}
	h.replace(t, first...)
	roots := x509.NewCertPool()
	for _, chain := range append(others, first) {
		roots.AddCert(chain[len(chain)-1].Leaf)
	}
	m, err := certs.LoadManual(certs.ManualConfig{
		CertFile: h.cert, KeyFile: h.key, Names: []string{relayName}, Roots: roots,
		Changed: func(name string) { h.changed = append(h.changed, name) }, Log: zerolog.New(h.log),
	})
	if err != nil {
		t.Fatal(err)
	}
	h.served = serve(t, m, roots)
	return h
}

func (h *held) replace(t *testing.T, chain ...*tls.Certificate) {
	t.Helper()
	testkit.WritePair(t, h.cert, h.key, chain...)
}

// settle waits until the manager has taken notice of the files.
func settle() {
	<-time.After(10 * time.Second)
	synctest.Wait()
}

// want asserts which certificate clients get, and which one waits; nil for none.
func (h *held) want(t *testing.T, when string, served, waiting *tls.Certificate) {
	t.Helper()
	if got := h.leaf(t); !got.Equal(served.Leaf) {
		t.Errorf("%s: clients get %s, want %s", when, certs.ShortHash(got), certs.ShortHash(served.Leaf))
	}
	s := h.Status()
	switch {
	case waiting == nil && s.Waiting != nil:
		t.Errorf("%s: %s waits", when, certs.ShortHash(s.Waiting))
	case waiting != nil && !s.Waiting.Equal(waiting.Leaf):
		t.Errorf("%s: %v waits, want %s; the error is %v", when, s.Waiting, certs.ShortHash(waiting.Leaf), s.Err)
	}
}

// wantErr asserts that an error has some parts.
func wantErr(t *testing.T, what string, err error, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: the error is %v, want %q", what, err, part)
		}
	}
}

// Files that change the map wait, in each direction, and are served when they are
// accepted. Status and log name both pins and the command.
func TestFilesThatNeedANewMapWait(t *testing.T) {
	one, other := []*tls.Certificate{selfSigned(t)}, []*tls.Certificate{selfSigned(t)}
	root := testkit.NewAuthority(t)
	signed := []*tls.Certificate{testkit.NewCertificate(t, testkit.Certificate{Names: []string{relayName}, NotAfter: time.Now().AddDate(80, 0, 0), Issuer: root}), root}
	short := func(chain []*tls.Certificate) string { return certs.ShortHash(chain[0].Leaf) }
	for name, tt := range map[string]struct {
		from, to      []*tls.Certificate
		before, after string // as messages have them
		certName      string
	}{
		"another self-signed one":           {one, other, "pin " + short(one), "pin " + short(other), certs.Pin(other[0].Leaf)},
		"an authority's for a self-signed":  {one, signed, "pin " + short(one), "no pin", ""},
		"a self-signed for an authority's ": {signed, one, "no pin", "pin " + short(one), certs.Pin(one[0].Leaf)},
	} {
		for _, hash := range []string{"", short(tt.to), strings.ToUpper(testkit.Hash(tt.to[0].Leaf)), colons(testkit.Hash(tt.to[0].Leaf)), "sha256-raw:" + testkit.Hash(tt.to[0].Leaf)} {
			t.Run(name+" "+hash, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					setClock()
					h := hold(t, tt.from, tt.to)
					h.replace(t, tt.to...)
					settle()
					h.want(t, "replaced", tt.from[0], tt.to[0])
					wantErr(t, "replaced", h.Status().Err, "("+tt.after+", now "+tt.before+")", "`derpd pin --accept "+short(tt.to)+"`", "restart derpd", "put the old files back")
					settle()
					if n := strings.Count(h.log.String(), "the certificate files need a new map"); n != 1 || !strings.Contains(h.log.String(), `"warn","now":"`+tt.before+`","new":"`+tt.after) {
						t.Errorf("logged %d times:\n%s", n, h.log.String())
					}
					if s := h.Status(); s.Reloads != 0 || s.ReloadErrors != 0 || len(h.changed) != 0 {
						t.Errorf("before it is accepted: %d reloads, %d errors, %v", s.Reloads, s.ReloadErrors, h.changed)
					}
					if err := h.Accept(hash); err != nil {
						t.Fatal(err)
					}
					h.want(t, "accepted", tt.to[0], nil)
					settle()
					h.want(t, "later", tt.to[0], nil)
					if s := h.Status(); s.Err != nil || s.Reloads != 1 || s.Pin != tt.certName || !slices.Equal(h.changed, []string{tt.certName}) {
						t.Errorf("accepted: %+v, changed %q", s, h.changed)
					}
					if err := h.Accept(""); !errors.Is(err, certs.ErrNothingWaits) {
						t.Errorf("accepted without anything that waits: %v", err)
					}
					if err := h.Accept(short(tt.to)); err != nil {
						t.Errorf("accepted again: %v", err)
					}
				})
			})
		}
	}
}

// selfSigned makes a certificate that is valid in every test, in a bubble too.
func selfSigned(t *testing.T) *tls.Certificate {
	t.Helper()
	return until(t, time.Now().AddDate(80, 0, 0))
}

// until makes a self-signed certificate that ends at a time.
func until(t *testing.T, end time.Time) *tls.Certificate {
	t.Helper()
	return testkit.NewCertificate(t, testkit.Certificate{Names: []string{relayName}, NotBefore: time.Unix(0, 0), NotAfter: end})
}

// Files that need no new map are served at once.
func TestFilesThatNeedNoNewMap(t *testing.T) {
	root, otherRoot := testkit.NewAuthority(t), testkit.NewAuthority(t)
	of := func(root *tls.Certificate) *tls.Certificate {
		return testkit.NewCertificate(t, testkit.Certificate{Names: []string{relayName}, NotBefore: time.Unix(0, 0), NotAfter: time.Now().AddDate(80, 0, 0), Issuer: root})
	}
	one := selfSigned(t)
	for name, tt := range map[string]struct {
		from, to []*tls.Certificate
		reloads  uint64
	}{
		"a renewal":          {[]*tls.Certificate{of(root), root}, []*tls.Certificate{of(root), root}, 1},
		"another authority":  {[]*tls.Certificate{of(root), root}, []*tls.Certificate{of(otherRoot), otherRoot}, 1},
		"a copy in the file": {[]*tls.Certificate{one}, []*tls.Certificate{one, one}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				setClock()
				h := hold(t, tt.from, tt.to)
				h.replace(t, tt.to...)
				settle()
				h.want(t, "replaced", tt.to[0], nil)
				if s := h.Status(); s.Err != nil || s.Reloads != tt.reloads || len(h.changed) != 0 {
					t.Errorf("%+v, changed %q", s, h.changed)
				}
			})
		})
	}
}

// The files change again while a certificate waits: only the announced one, or the one
// that is named, is accepted.
func TestFilesChangeWhileTheyWait(t *testing.T) {
	one, second, third := selfSigned(t), selfSigned(t), selfSigned(t)
	short := func(c *tls.Certificate) string { return certs.ShortHash(c.Leaf) }
	synctest.Test(t, func(t *testing.T) {
		h := hold(t, []*tls.Certificate{one}, []*tls.Certificate{second}, []*tls.Certificate{third})
		wantErr(t, "nothing was announced", h.Accept(""), "no certificate waits")
		wantErr(t, "another hash than that of the files", h.Accept(short(second)), "no certificate waits", short(second), "("+short(one)+")")

		h.replace(t, second)
		wantErr(t, "before the warning", h.Accept(""), "have changed just now", "derpd pin --accept "+short(second))
		h.want(t, "before the warning", one, second)
		settle()
		h.replace(t, third)
		wantErr(t, "another one than announced", h.Accept(""), "have changed just now", "derpd pin --accept "+short(third))
		h.replace(t, second)
		settle()
		h.replace(t, third)
		wantErr(t, "the hash of the earlier one", h.Accept(short(second)), short(third)+", not "+short(second), "derpd pin --accept "+short(third))
		wantErr(t, "a hash that anybody has", h.Accept(short(third)[:8]), "at least 16 digits")
		h.want(t, "nothing accepted", one, third)

		if err := os.WriteFile(h.cert, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		wantErr(t, "damaged", h.Accept(short(third)), "the new files are invalid")
		h.want(t, "damaged", one, nil)

		h.replace(t, second)
		settle()
		h.want(t, "replaced", one, second)
		h.replace(t, one)
		settle()
		h.want(t, "taken back", one, nil)
		wantErr(t, "taken back", h.Accept(""), "no certificate waits")
		if s := h.Status(); s.Err != nil || s.Reloads != 0 || len(h.changed) != 0 {
			t.Errorf("%+v, changed %q", s, h.changed)
		}

		// The operator knows the hash, and does not wait for the warning.
		h.replace(t, third)
		if err := h.Accept(short(third)); err != nil {
			t.Error(err)
		}
		h.want(t, "accepted by its hash", third, nil)
	})
}

// The key arrives seconds after the certificate.
func TestFilesArriveOneAfterTheOther(t *testing.T) {
	one, other := selfSigned(t), selfSigned(t)
	synctest.Test(t, func(t *testing.T) {
		h := hold(t, []*tls.Certificate{one}, []*tls.Certificate{other})
		write(t, h.cert, chainPEM(t, other))
		wantErr(t, "half of the pair", h.Accept(certs.ShortHash(other.Leaf)), "does not belong to")
		settle()
		h.want(t, "half of the pair", one, nil)
		wantErr(t, "half of the pair", h.Status().Err, "the new files are invalid")
		write(t, h.key, keyPEM(t, other))
		settle()
		h.want(t, "the pair", one, other)
	})
}

// A certificate that all clients refuse protects nobody: the one that waits takes its
// place, unless clients refuse that one as well.
func TestFilesWaitUntilTheOldOneIsUseless(t *testing.T) {
	end := time.Date(2000, 1, 1, 1, 0, 0, 0, time.UTC) // an hour after the begin of a bubble
	old, next, short := until(t, end), selfSigned(t), until(t, end.Add(-time.Minute))
	synctest.Test(t, func(t *testing.T) {
		h := hold(t, []*tls.Certificate{old}, []*tls.Certificate{next})
		h.replace(t, next)
		<-time.After(time.Until(end.Add(-time.Second)))
		h.want(t, "before the end", old, next)
		settle()
		h.want(t, "after the end", next, nil)
		if !slices.Equal(h.changed, []string{certs.Pin(next.Leaf)}) || !strings.Contains(h.log.String(), "served without `derpd pin --accept`") {
			t.Errorf("changed %q, logged\n%s", h.changed, h.log.String())
		}
	})
	synctest.Test(t, func(t *testing.T) {
		h := hold(t, []*tls.Certificate{old}, []*tls.Certificate{next})
		<-time.After(time.Until(end.Add(time.Minute)))
		h.replace(t, next)
		settle()
		if s := h.Status(); !s.Leaf.Equal(next.Leaf) || s.Waiting != nil {
			t.Errorf("new files after the end of the old ones: %+v", s)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		h := hold(t, []*tls.Certificate{old}, []*tls.Certificate{short})
		h.replace(t, short)
		<-time.After(time.Until(end.Add(-30 * time.Second)))
		wantErr(t, "expired", h.Accept(""), "expired on")
		<-time.After(2 * time.Minute)
		if s := h.Status(); !s.Leaf.Equal(old.Leaf) {
			t.Errorf("both have ended: %+v", s)
		}
	})
}

// An intermediate that expires makes a chain useless too.
func TestFilesWaitUntilTheOldChainIsUseless(t *testing.T) {
	end := time.Date(2000, 1, 1, 1, 0, 0, 0, time.UTC)
	root := issue(t, "Test Root", true, time.Unix(0, 0), end.AddDate(1, 0, 0), nil)
	middle := issue(t, "Test Intermediate", true, time.Unix(0, 0), end, root)
	leaf := issue(t, relayName, false, time.Unix(0, 0), end.AddDate(0, 1, 0), middle)
	next := selfSigned(t)
	synctest.Test(t, func(t *testing.T) {
		h := hold(t, []*tls.Certificate{leaf, middle, root}, []*tls.Certificate{next})
		h.replace(t, next)
		settle()
		h.want(t, "before the end", leaf, next)
		<-time.After(time.Until(end.Add(10 * time.Second)))
		h.want(t, "after the end", next, nil)
	})
}

// The pinned certificate changes by RotatePinned alone. Another one in its place waits.
func TestPinnedReplacedByHand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		setClock()
		dir := t.TempDir()
		config := func(name string) certs.PinnedConfig {
			return certs.PinnedConfig{Path: filepath.Join(dir, name), Names: []string{relayName}, Log: zerolog.Nop()}
		}
		c := config("pinned.pem")
		var changed []string
		c.Changed = func(name string) { changed = append(changed, name) }
		m, err := certs.LoadOrCreatePinned(c)
		if err != nil {
			t.Fatal(err)
		}
		s := serve(t, m, nil)
		first := s.Status().Pin
		if err := certs.RotatePinned(config("other.pem"), now); err != nil {
			t.Fatal(err)
		}
		rename(t, filepath.Join(dir, "other.pem"), c.Path)
		settle()
		if st := s.Status(); st.Pin != first || st.Waiting == nil {
			t.Errorf("replaced by hand: %+v", st)
		}
		if err := certs.RotatePinned(c, now); err != nil {
			t.Fatal(err)
		}
		settle()
		st := s.Status()
		if st.Pin == first || st.Waiting != nil || st.Err != nil || !slices.Equal(changed, []string{st.Pin}) {
			t.Errorf("rotated: %+v, changed %q", st, changed)
		}
	})
}

// A certificate is accepted once, however many commands and readings run at the same
// time.
func TestAcceptedOnce(t *testing.T) {
	one, other := selfSigned(t), selfSigned(t)
	synctest.Test(t, func(t *testing.T) {
		h := hold(t, []*tls.Certificate{one}, []*tls.Certificate{other})
		h.replace(t, other)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 20 {
					if err := h.Accept(certs.ShortHash(other.Leaf)); err != nil {
						t.Error(err)
					}
					h.Status()
					<-time.After(time.Second)
				}
			})
		}
		wg.Wait()
		h.want(t, "accepted", other, nil)
		if s := h.Status(); s.Reloads != 1 || len(h.changed) != 1 || s.Err != nil {
			t.Errorf("%+v, changed %q", s, h.changed)
		}
	})
}

// colons writes a hash as `openssl x509 -fingerprint` does.
func colons(hash string) string {
	pairs := make([]string, 0, len(hash)/2)
	for pair := range slices.Chunk([]byte(strings.ToUpper(hash)), 2) {
		pairs = append(pairs, string(pair))
	}
	return strings.Join(pairs, ":")
}
