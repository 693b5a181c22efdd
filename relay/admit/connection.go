package admit

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"unicode"
)

// transport returns a transport whose servers are verified by roots, or by the
// system's with nil.
func transport(roots *x509.CertPool) *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.MaxResponseHeaderBytes = 64 << 10
	t.TLSClientConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	return t
}

// explainConnection returns err, an error of [http.Client.Do], without the URL, which
// may hold a token, and with the fix.
func explainConnection(err error) error {
	if inner, ok := errors.AsType[*url.Error](err); ok {
		err = inner.Err
	}
	return fmt.Errorf("%w%s", err, connectionRemedy(err))
}

// connectionRemedy is the end of a message about a connection, or empty.
func connectionRemedy(err error) string {
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "; if the authority is a private one, set DERP_CA_ROOTS to its roots"
	}
	switch {
	case errors.Is(err, http.ErrSchemeMismatch):
		return "; write http:// in place of https://"
	}
	return ""
}

const maxCause = 300 // length of an error message for operators, in bytes

// shortLine returns text of another program in a form for messages: on one line, and
// at most maxCause bytes.
func shortLine(text string) string {
	text = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, text)
	if len(text) > maxCause {
		text = strings.ToValidUTF8(text[:maxCause], "") + "…"
	}
	return text
}
