// Package redact keeps secrets out of logs, health, metrics and error messages. Texts
// of other programs, and values in the wrong variable or file, may contain them.
package redact

import (
	"io"
	"regexp"
	"strings"
	"unicode/utf8"
)

// ellipsis stands for what was cut.
const ellipsis = "…"

// shapes are secrets that have a shape. The first group stays.
var shapes = []*regexp.Regexp{
	regexp.MustCompile(`\b((?:ts|hs)key-[a-z]+-)[A-Za-z0-9_][A-Za-z0-9_-]*`),                                                                        // of Tailscale and Headscale
	regexp.MustCompile(`\b((?:ts|hs)key-)[A-Za-z0-9_]*[A-Z0-9][A-Za-z0-9_-]*`),                                                                      // of Tailscale, without a kind
	regexp.MustCompile(`\b((?:nl|chal)?priv(?:key)?:)[0-9A-Fa-f]{4,}`),                                                                              // private keys of nodes and machines
	regexp.MustCompile(`(://)[^/?#\s"'\\@]+@`),                                                                                                      // user and password of a URL
	regexp.MustCompile(`(?i)\b((?:client_secret|access_token|refresh_token|id_token|api_?key|auth_?key|password|passwd|token|secret)=)[^&\s"'\\]+`), // of forms and queries
	regexp.MustCompile(`\b((?:Bearer|Basic) )[A-Za-z0-9+/=._~-]{8,}`),                                                                               // of the header Authorization
	regexp.MustCompile(`\b(eyJ)[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?`),                                                          // JSON Web Tokens
	regexp.MustCompile(`\b((?:gh[pousr]|github_pat)_)[A-Za-z0-9_]{16,}`),
	regexp.MustCompile(`(?s)(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)`),
}

// Secrets returns text with every secret cut to the prefix that names its kind.
func Secrets(text string) string {
	for _, shape := range shapes {
		text = shape.ReplaceAllStringFunc(text, func(found string) string {
			kept := shape.FindStringSubmatch(found)[1]
			if kept == "://" {
				return kept + ellipsis + "@"
			}
			return kept + ellipsis
		})
	}
	return text
}

// shown is the number of characters that [Value] shows of a value of no shape.
const shown = 4

// public are prefixes of values that are no secret.
var public = []string{"nodekey:", "mkey:", "discokey:"}

// Value returns a value that may be a secret, for the message that it is wrong: public
// keys in whole, and four characters of what has no shape.
func Value(value string) string {
	for _, prefix := range public {
		if strings.HasPrefix(value, prefix) && len(value) <= 80 {
			return value
		}
	}
	if cut := Secrets(value); cut != value {
		return cut
	}
	if utf8.RuneCountInString(value) <= shown {
		return value
	}
	return string([]rune(value)[:shown]) + ellipsis
}

// word matches a part of a path that is no token: words, and versions such as v2.
var word = regexp.MustCompile(`^(?:[A-Za-z]{1,20}(?:[-_.@][A-Za-z]{1,20}){0,4}|v[0-9]{1,2})?$`)

// Path returns the path of a URL without the parts that may be tokens: those that are
// not made of words.
func Path(path string) string {
	parts := strings.Split(path, "/")
	for i, part := range parts {
		if !word.MatchString(part) {
			parts[i] = ellipsis
		}
	}
	return strings.Join(parts, "/")
}

// Writer returns a writer that passes every write to w without secrets. Each write must
// be a whole text, such as one line of a log.
func Writer(w io.Writer) io.Writer { return writer{w} }

type writer struct{ below io.Writer }

// Write implements [io.Writer].
func (w writer) Write(p []byte) (int, error) {
	if _, err := io.WriteString(w.below, Secrets(string(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}
