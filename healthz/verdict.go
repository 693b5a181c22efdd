package healthz

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"tailscale.com/derp/derpconst"

	"derpd/internal/issuer"
)

// pinPrefix begins a CertName that is a hash (tailcfg.DERPNode.CertName).
const pinPrefix = "sha256-raw:"

// Clients is what clients of a relay verify its certificate by.
type Clients struct {
	// HostName and CertName are the fields of the relay's node in the DERP
	// map.
	HostName, CertName string

	// Roots are the roots that clients have: those of this machine stand for
	// theirs. Clients also have Let's Encrypt's roots compiled in. With a pin
	// in CertName, clients use no roots.
	Roots *x509.CertPool

	// Private are roots that only this relay is known to have; nil for none.
	// PrivateName is the variable that they come from.
	Private     *x509.CertPool
	PrivateName string
}

// Pinned reports whether clients compare a hash, and use no roots.
func (c Clients) Pinned() bool { return strings.HasPrefix(c.CertName, pinPrefix) }

// verifiedName is the name that clients look for in the certificate. It is empty
// when they dial an address: crypto/tls then has no server name, and tlsdial of
// tailscale.com verifies the chain alone.
func (c Clients) verifiedName() string {
	switch {
	case c.CertName != "" && !c.Pinned():
		return c.CertName
	case net.ParseIP(c.HostName) != nil:
		return ""
	}
	return c.HostName
}

// Verdict is what clients make of a certificate. A verdict of level Warn means that
// some clients may refuse it, and Fail that all do.
type Verdict struct {
	Level Level
	Cause string // empty for OK
	Fix   string // empty for OK

	// Until is the next date of a certificate at which the verdict may change;
	// zero if there is none.
	Until time.Time
}

// String returns the cause and the fix.
func (v Verdict) String() string {
	if v.Fix == "" {
		return v.Cause
	}
	return v.Cause + "; " + v.Fix
}

// Err returns the verdict as an error if all clients refuse the certificate.
func (v Verdict) Err() error {
	if v.Level != Fail {
		return nil
	}
	return errors.New(v.String())
}

// Judge returns the verdict on the certificates of a TLS handshake, in the order in
// which they were sent. It applies the rules of tailscale.com/net/tlsdial, and fetches
// no missing certificate.
func (c Clients) Judge(sent []*x509.Certificate, now time.Time) Verdict {
	sent = withoutMeta(sent)
	var v Verdict
	switch {
	case len(sent) == 0:
		return Verdict{Level: Fail, Cause: "no certificate was sent", Fix: "give this relay a certificate for " + c.HostName}
	case c.Pinned():
		v = c.judgePin(sent, now)
	default:
		v = onPlatforms(c.judgeChain(sent, now), pathOf(sent, now))
	}
	v.Until = nextDate(sent, now, v.Until)
	return v
}

// withoutMeta leaves out the meta certificate, which has the relay's node key and is
// verified by no client.
func withoutMeta(sent []*x509.Certificate) []*x509.Certificate {
	return slices.DeleteFunc(slices.Clone(sent), func(c *x509.Certificate) bool {
		return strings.HasPrefix(c.Subject.CommonName, derpconst.MetaCertCommonNamePrefix)
	})
}

// judgePin applies the rule of tlsdial.SetConfigExpectedCertHash. The chain, the roots
// and the key usage do not matter.
func (c Clients) judgePin(sent []*x509.Certificate, now time.Time) Verdict {
	const paste = "paste the map that `derpd derpmap` prints"
	leaf := sent[0]
	if got := fmt.Sprintf("%x", sha256.Sum256(leaf.Raw)); got != strings.TrimPrefix(c.CertName, pinPrefix) {
		return failed("the certificate has the hash "+short(got)+", but the map has the pin "+short(strings.TrimPrefix(c.CertName, pinPrefix)), paste)
	}
	if v, bad := c.judgeName(leaf); bad {
		return v
	}
	if cause := outOfDate(leaf, now); cause != "" {
		return failed(cause, dateFix(leaf, now))
	}
	if len(sent) > 1 {
		return failed(fmt.Sprintf("%d certificates are sent, but clients with a pin accept one alone", len(sent)), "leave the self-signed certificate alone in the file, or use one of an authority")
	}
	return Verdict{}
}

// short is the start of a hash.
func short(hash string) string { return hash[:min(16, len(hash))] }

func failed(cause, fix string) Verdict { return Verdict{Level: Fail, Cause: cause, Fix: fix} }

// judgeName checks the name that clients verify in the certificate.
func (c Clients) judgeName(leaf *x509.Certificate) (Verdict, bool) {
	name := c.verifiedName()
	if name == "" || leaf.VerifyHostname(name) == nil {
		return Verdict{}, false
	}
	cause := fmt.Sprintf("the certificate is for %s, but clients ask for %s", strings.Join(issuer.Names(leaf), " "), name)
	if len(issuer.Names(leaf)) == 0 {
		cause = fmt.Sprintf("the certificate has no subject alternative name, but clients ask for %s and ignore the common name %q", name, leaf.Subject.CommonName)
	}
	return failed(cause, "get a certificate for "+name), true
}

// outOfDate is the cause if a certificate is not valid now, or an empty string.
func outOfDate(c *x509.Certificate, now time.Time) string {
	switch {
	case now.After(c.NotAfter):
		return fmt.Sprintf("the certificate of %s expired on %s", called(c), c.NotAfter.UTC().Format(time.DateOnly))
	case now.Before(c.NotBefore):
		return fmt.Sprintf("the certificate of %s is not valid before %s", called(c), c.NotBefore.UTC().Format("2006-01-02 15:04 MST"))
	}
	return ""
}

func dateFix(c *x509.Certificate, now time.Time) string {
	switch {
	case now.Before(c.NotBefore):
		return "wait, or set the clock of this machine"
	case c.IsCA:
		return "replace it in the file by the present one of the authority"
	}
	return "renew it"
}

// nextDate is the first date of the certificates after now. The limit may be earlier.
func nextDate(sent []*x509.Certificate, now, limit time.Time) time.Time {
	for _, c := range sent {
		for _, date := range []time.Time{c.NotBefore, c.NotAfter} {
			if date.After(now) && (limit.IsZero() || date.Before(limit)) {
				limit = date
			}
		}
	}
	return limit
}

// Judgements remembers the last verdict. A handshake every few seconds then costs no
// verification of the chain.
type Judgements struct {
	mu      sync.Mutex
	key     [sha256.Size]byte // of the question; guarded by mu
	verdict Verdict           // guarded by mu
	judged  time.Time         // of the verdict, zero before the first; guarded by mu
}

// judgedFor limits the use of a verdict. The clock of the machine may be set.
const judgedFor = time.Hour

// Of returns the verdict of [Clients.Judge]. The last verdict is used again for the same
// certificates and the same map, until the next date of a certificate. roots is called only for a new verdict
// without a pin.
func (j *Judgements) Of(c Clients, roots func() *x509.CertPool, sent []*x509.Certificate, now time.Time) Verdict {
	hash := sha256.New()
	_, _ = fmt.Fprintf(hash, "%q %q\n", c.HostName, c.CertName)
	for _, cert := range withoutMeta(sent) {
		sum := sha256.Sum256(cert.Raw)
		_, _ = hash.Write(sum[:])
	}
	key := [sha256.Size]byte(hash.Sum(nil))

	j.mu.Lock()
	defer j.mu.Unlock()
	now = now.Round(0) // the monotonic clock does not change when the clock is set
	age := now.Sub(j.judged)
	fresh := key == j.key && age >= 0 && age < judgedFor && (j.verdict.Until.IsZero() || !now.After(j.verdict.Until))
	if !fresh {
		if !c.Pinned() {
			c.Roots = roots()
		}
		j.key, j.verdict, j.judged = key, c.Judge(sent, now), now
	}
	return j.verdict
}
