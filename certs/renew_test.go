package certs_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"derpd/certs"
	"derpd/internal/testkit"
	"derpd/internal/testkit/acmetest"
)

// A certificate is renewed before it expires, and new connections get the new one.
// A certificate that expired while the relay was down is renewed at the start.
func TestACMERenews(t *testing.T) {
	authority := acmetest.Start(t)
	authority.Validity = 15 * time.Second // renewed 5 s before the end, also on a busy machine
	l := listen(t)
	authority.Validate(t, portOf(l.http), portOf(l.https))
	// certmagic's pauses after a failed renewal are kept by name.
	name := fmt.Sprintf("renewal-%d.example.com", time.Now().UnixNano())
	var log testkit.Buffer
	c := certs.ACMEConfig{
		Names: []string{name}, Directory: authority.Directory, Roots: authority.ServerRoots,
		ListenHost: "127.0.0.1", HTTPPort: portOf(l.http), Dir: t.TempDir(), Log: zerolog.New(&log).Level(zerolog.InfoLevel),
		CheckEvery: 100 * time.Millisecond,
	}
	var expires time.Time
	t.Run("before the end", func(t *testing.T) {
		m := certs.NewACME(c)
		serveChallenges(t, m, l)
		waitReady(t, m)
		client := &tls.Config{ServerName: name, RootCAs: authority.Roots(), MinVersion: tls.VersionTLS12}
		first := eventually(t, l, "127.0.0.1", client)
		if !c.Stored() {
			t.Error("Stored is false for a valid certificate")
		}
		served{Manager: m}.until(t, "renewed", func(st certs.Status) bool { return st.Reloads > 0 && st.Leaf != nil && !st.Leaf.Equal(first) })
		if !time.Now().Before(first.NotAfter) {
			t.Errorf("renewed after the end at %s", first.NotAfter)
		}
		if eventually(t, l, "127.0.0.1", client).Equal(first) {
			t.Error("a new connection gets the old certificate")
		}
		if !strings.Contains(log.String(), `"renewal":false`) || !strings.Contains(log.String(), `"renewal":true`) {
			t.Errorf("the log has no certificate and renewal:\n%s", log.String())
		}
		expires = m.Status().Leaf.NotAfter
	})

	<-time.After(time.Until(expires) + time.Second)
	if c.Stored() {
		t.Error("Stored is true for an expired certificate")
	}
	c.CheckEvery = time.Hour
	m := certs.NewACME(c)
	serveChallenges(t, m, listenOn(t, l.https.Addr().String(), l.http.Addr().String()))
	served{Manager: m}.until(t, "renewed at the start", func(st certs.Status) bool {
		return st.Reloads == 1 && st.Leaf != nil && time.Now().Before(st.Leaf.NotAfter) && !errors.Is(st.Err, certs.ErrNone)
	})
}
