package certs

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"
)

// ErrNothingWaits is the error of [Manager.Accept] when the certificate in use is the
// newest one.
var ErrNothingWaits = errors.New("no certificate waits to be accepted")

// shortHash is the number of hex digits of a hash in messages.
const shortHash = 16

// ShortHash is the start of a certificate's SHA-256 in hex, for messages and for
// [Manager.Accept].
func ShortHash(c *x509.Certificate) string {
	return hash(c)[:shortHash]
}

func hash(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// DescribeCertName describes a CertName of the DERP map for messages.
func DescribeCertName(name string) string {
	if pin, ok := strings.CutPrefix(name, pinPrefix); ok {
		return "pin " + pin[:min(shortHash, len(pin))]
	}
	return "no pin"
}

// certName is the CertName that the DERP map needs for the certificate: its pin if it
// is self-signed, empty if an authority has signed it. Clients with a pin accept one
// certificate, not a chain (tlsdial's SetConfigExpectedCertHash).
func (l *loaded) certName() string {
	if len(l.cert.Certificate) == 1 && selfIssued(l.cert.Leaf) {
		return Pin(l.cert.Leaf)
	}
	return ""
}

// mustWait reports whether a certificate waits for Accept. Clients of the present map
// refuse such a certificate, and accept the one in use. Nothing waits once all clients
// refuse the certificate in use.
func (f *files) mustWait(found *loaded, now time.Time) bool {
	current := f.current.Load()
	return !found.meant && found.certName() != current.certName() && current.check(now) == nil
}

// hold keeps a certificate for Accept, and logs how to decide.
func (f *files) hold(found *loaded) {
	current := f.current.Load()
	before, after := DescribeCertName(current.certName()), DescribeCertName(found.certName())
	accept := "derpd pin --accept " + ShortHash(found.cert.Leaf)
	f.waiting = found
	f.err = fmt.Errorf("the files have another certificate, with which every client fails until it has a new map (%s, now %s): it is not served yet; run `%s` or restart derpd and paste the new map, or put the old files back",
		after, before, accept)
	f.log.Warn().Str("now", before).Str("new", after).Time("not_after", current.cert.Leaf.NotAfter).
		Str("fix", "run `"+accept+"` or restart derpd, and paste the new map; or put the old files back").
		Msg("the certificate files need a new map; the old certificate is served until this is accepted")
}

// Accept implements [Manager]. A hash of the certificate in use is accepted already,
// so that the command may be repeated.
func (f *files) Accept(prefix string) error {
	prefix = strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(prefix, pinPrefix)), ":", "") // openssl prints colons
	if prefix != "" && len(prefix) < shortHash {
		return fmt.Errorf("want at least %d digits of the hash, got %q", shortHash, prefix)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	announced := f.waiting
	f.reloadLocked()
	is := func(l *loaded) bool { return prefix != "" && strings.HasPrefix(hash(l.cert.Leaf), prefix) }
	w := f.waiting
	switch {
	case w == nil && is(f.current.Load()):
		return nil
	case w == nil && f.err != nil:
		return f.err
	case w == nil && prefix != "":
		return fmt.Errorf("%w; %s is not the hash of the one that is served (%s)", ErrNothingWaits, prefix, ShortHash(f.current.Load().cert.Leaf))
	case w == nil:
		return ErrNothingWaits
	case prefix == "" && w != announced:
		return fmt.Errorf("the files have changed just now; if this is meant, run `derpd pin --accept %s`", ShortHash(w.cert.Leaf))
	case prefix != "" && !is(w):
		return fmt.Errorf("the files have the certificate %s, not %s; if this is meant, run `derpd pin --accept %[1]s`", ShortHash(w.cert.Leaf), prefix)
	}
	if err := w.check(time.Now()); err != nil {
		return err
	}
	f.replace(w)
	return nil
}

// uselessEvery is the interval at which a certificate that waits is compared with the
// one in use.
const uselessEvery = 2 * time.Second

// replaceUseless serves the certificate that waits once all clients refuse the one in
// use, because it has expired. Clients of the old map fail with both, and clients of
// the new map succeed.
func (f *files) replaceUseless(ctx context.Context) {
	ticker := time.NewTicker(uselessEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		f.mu.Lock()
		if now := time.Now(); f.waiting != nil && f.waiting.check(now) == nil && !f.mustWait(f.waiting, now) {
			f.log.Warn().Msg("clients refuse the old certificate, so the new one is served without `derpd pin --accept`")
			f.replace(f.waiting)
		}
		f.mu.Unlock()
	}
}
