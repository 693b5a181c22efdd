// Package redact keeps secrets out of logs, health, metrics and error messages. Texts
// of other programs, and values in the wrong variable or file, may contain them.
package redact

import (
	"io"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"
)

// ellipsis stands for what was cut.
const ellipsis = "…"

// shape is a kind of secret that can be recognised.
type shape struct {
	// hints are lower-case texts. Each secret of the shape contains one of every list.
	// A search for them is much faster than the expression, which counts in a log at
	// debug level.
	hints [][]string

	// secret matches it. The first group stays. It is compiled at its first use,
	// because a start would wait for all of them.
	secret func() *regexp.Regexp
}

// named are names of secrets in forms, queries, variables and JSON of other programs.
const named = `[\w-]*(?:secret|token|password|passwd|(?:api|auth|access|account|eab|hmac|mesh)[-_]?key|signature|hmac)`

var shapes = []shape{
	{[][]string{{"tskey-", "hskey-"}}, lazily(`((?:ts|hs)key-[a-z]+-)[A-Za-z0-9_][A-Za-z0-9_-]*`)},                                                                                                                                          // of Tailscale and Headscale
	{[][]string{{"tskey-", "hskey-"}}, lazily(`((?:ts|hs)key-)[A-Za-z0-9_]*[A-Z0-9][A-Za-z0-9_-]*`)},                                                                                                                                        // of Tailscale, without a kind
	{[][]string{{"priv:", "privkey:"}}, lazily(`((?:nl|chal)?priv(?:key)?:)[0-9A-Fa-f]{4,}`)},                                                                                                                                               // private keys of nodes and machines
	{[][]string{{"://"}, {"@"}}, lazily(`(://)[^/?#\s"'\\]+@`)},                                                                                                                                                                             // user and password of a URL
	{[][]string{{"key=", "secret=", "token=", "password=", "passwd=", "signature=", "hmac="}}, lazily(`(?i)((?:\b` + named + `|[?&]key)=)[^&\s"'\\…$<{]+…?`)},                                                                               // of forms, queries and variables
	{[][]string{{":"}, {"key\"", `key\"`, "secret", "token", "passw", "signature", "hmac"}, {"api", "auth", "acc", "eab", "mesh", "secret", "token", "passw", "signature", "hmac"}}, lazily(`(?i)("` + named + `\\?"\s*:\s*\\?")[^"\\…]+`)}, // of JSON, also within a string
	{[][]string{{"x-"}, {": "}}, lazily(`(?i)\b(X-[a-z-]*(?:Key|Token|Secret): )[^\s"'\\]+`)},                                                                                                                                               // of headers
	{[][]string{{"bearer "}}, lazily(`\b((?i:Bearer) )[a-z+/._~-]*[A-Z0-9=][A-Za-z0-9+/=._~-]*`)},                                                                                                                                           // of the header Authorization
	{[][]string{{"basic "}}, lazily(`\b((?i:Basic) )[a-z+/]*[A-Z0-9=][A-Za-z0-9+/=]{4,}`)},                                                                                                                                                  // of the header Authorization
	{[][]string{{"eyj"}, {"."}}, lazily(`\b(eyJ)[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?`)},                                                                                                                                // JSON Web Tokens
	{[][]string{{"ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"}}, lazily(`\b((?:gh[pousr]|github_pat)_)[A-Za-z0-9_]{16,}`)},
	{[][]string{{"private key-----"}}, lazily(`(?s)(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)`)},
}

// Secrets returns text with every secret cut to the prefix that names its kind.
func Secrets(text string) string {
	lower := strings.ToLower(text)
	for _, s := range shapes {
		if s.hinted(lower) {
			text = s.secret().ReplaceAllStringFunc(text, s.cut)
		}
	}
	return text
}

func lazily(expression string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expression) })
}

// hinted reports whether a text may contain a secret of the shape.
func (s shape) hinted(lower string) bool {
	for _, list := range s.hints {
		if !slices.ContainsFunc(list, func(hint string) bool { return strings.Contains(lower, hint) }) {
			return false
		}
	}
	return true
}

// cut returns what may be shown of a secret.
func (s shape) cut(found string) string {
	kept := s.secret().FindStringSubmatch(found)[1]
	switch {
	case kept == "://":
		return kept + ellipsis + "@"
	case strings.HasSuffix(found, "-"+ellipsis):
		return found // cut by another shape, or the prefix of a key in a message
	}
	return kept + ellipsis
}

// shown is the number of characters that [Value] shows of a value of no known kind.
const shown = 4

// public are prefixes of values that are no secret.
var public = []string{"nodekey:", "mkey:", "discokey:"}

// Value returns the part of a wrong value that a message may show. Public keys are shown
// in whole, known secrets without their secret part, and of any other value four
// characters.
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

// word matches a part of a path that is no token: words, and versions such as v2. Letters
// in mixed case are a token.
var word = lazily(`^(?:(?:[A-Z]?[a-z]{1,19}|[A-Z]{1,8})(?:[-_.@](?:[A-Z]?[a-z]{1,19}|[A-Z]{1,8})){0,4}|v[0-9]{1,2})?$`)

// Path returns the path of a URL without the parts that may be tokens: those that are
// not made of words.
func Path(path string) string {
	parts := strings.Split(path, "/")
	for i, part := range parts {
		if !word().MatchString(part) {
			parts[i] = ellipsis
		}
	}
	return strings.Join(parts, "/")
}

// URL returns target without the parts that may hold a secret: user, password,
// query, fragment, and the parts of the path that are not made of words.
func URL(target string) string {
	u, err := url.Parse(target)
	if err != nil {
		return "(unparsable URL)"
	}
	u.User, u.RawQuery, u.Fragment = nil, "", ""
	if u.Host != "" {
		u.Path, u.RawPath = Path(u.Path), ""
	}
	shown := strings.ReplaceAll(u.String(), url.PathEscape(ellipsis), ellipsis)
	// Without a scheme, url.Parse returns the user as part of the path. A comma in
	// a password makes a URL without a scheme, because it splits a list of URLs.
	hasUser := u.Host == "" && strings.Contains(shown, "@")
	if hasUser || strings.Contains(shown, "privkey:") || strings.Contains(shown, "tskey-") {
		return "(unparsable URL)"
	}
	return shown
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
