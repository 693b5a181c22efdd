package nodelimits

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"derpd/internal/redact"
	"derpd/relay"
)

// mostErrors limits the errors of a file, which may be another than the operator meant.
const mostErrors = 10

// longestValue is the length of a setting's value that messages show in whole.
const longestValue = 40

// Parse reads the lines of a file of limits. Settings that a line leaves out are those
// of defaults, but a rate of a line brings its own burst. All errors are returned
// together, with their lines, up to mostErrors.
//
//	# WHO              SETTINGS
//	nodekey:3f5a…      rate=unlimited connections=32
//	comment:"my nas"   rate=50Mbit
//	tag:guest          rate=2Mbit burst=128KiB connections=2
//	tailnet:ours.ts.net rate=20Mbit
//	*                  rate=1Mbit
//
// The first line that fits a node counts.
func Parse(text string, defaults relay.NodeLimit) ([]Rule, error) {
	var rules []Rule
	var errs []error
	first := make(map[string]int) // line of each who
	n := 0
	for line := range strings.Lines(text) {
		n++
		failed := func(err error) { errs = append(errs, fmt.Errorf("line %d: %w", n, err)) }
		words, err := fields(line)
		if err != nil {
			failed(err)
			continue
		}
		if len(words) == 0 {
			continue
		}
		r, err := who(words[0])
		if err != nil {
			failed(err) // what follows may belong to it
			continue
		}
		if before, ok := first[r.id()]; ok {
			failed(fmt.Errorf("%s has a line already (line %d); remove one of the two", shown(words[0]), before))
		} else if before, ok := first[string(all)]; ok {
			failed(fmt.Errorf("%s never gets this limit, because * on line %d comes first; move the line with * to the end", shown(words[0]), before))
		} else {
			first[r.id()] = n
		}
		r.Line = n
		var settings []error
		r.Limit, settings = limit(words, defaults)
		for _, err := range settings {
			failed(err)
		}
		rules = append(rules, r)
	}
	if len(errs) > mostErrors {
		errs = append(errs[:mostErrors], fmt.Errorf("and %d more; correct these first", len(errs)-mostErrors))
	}
	if len(errs) == 0 && len(rules) == 0 {
		errs = append(errs, errors.New("no line has a limit; add one such as: tag:guest rate=2Mbit"))
	}
	return rules, errors.Join(errs...)
}

// id identifies who a rule is for.
func (r Rule) id() string {
	switch r.kind {
	case byKey:
		return r.node.String()
	case all:
		return string(all)
	case byTailnet:
		return strings.ToLower(string(r.kind) + ":" + r.value)
	}
	return string(r.kind) + ":" + r.value
}

var (
	kinds   = []kind{byKey, byComment, byTag, byTailnet}
	tagName = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_.-]*$`)
	blank   = " \t\r\n\v\f"
)

// fields splits a line at blanks. Blanks between quotes belong to a word, and # begins
// a comment.
func fields(line string) (words []string, err error) {
	var word strings.Builder
	begun, quoted, closed := false, false, false
	end := func() {
		if begun {
			words = append(words, word.String())
			word.Reset()
			begun, closed = false, false
		}
	}
	for _, c := range line {
		switch {
		case c == '"':
			closed = quoted
			quoted, begun = !quoted, true
		case quoted && c != '\n':
			word.WriteRune(c)
		case c == '#':
			end()
			return words, nil
		case strings.ContainsRune(blank, c):
			end()
		case closed:
			return nil, fmt.Errorf("want a blank after the closing quote, got %q; write one", string(c))
		default:
			if err := typed(c); err != nil {
				return nil, err
			}
			begun = true
			word.WriteRune(c)
		}
	}
	if quoted {
		return nil, errors.New(`a quote is not closed; write comment:"the comment"`)
	}
	end()
	return words, nil
}

// typed refuses characters that look like those of a line: input methods for Chinese,
// word processors and web pages insert them.
func typed(c rune) error {
	var meant string
	switch {
	case c >= '\uff01' && c <= '\uff5e': // full-width forms of ! to ~
		meant = string(c - '\uff01' + '!')
	case strings.ContainsRune("\u201c\u201d\u201e\u00ab\u00bb", c):
		meant = `"`
	case unicode.IsSpace(c):
		return fmt.Errorf("has a blank of another kind (%U); write an ordinary blank", c)
	case unicode.Is(unicode.Cf, c) || unicode.IsControl(c):
		return fmt.Errorf("has an invisible character (%U); remove it", c)
	default:
		return nil
	}
	return fmt.Errorf("has %q (%U); write %s, or put a comment that has it in quotes", string(c), c, meant)
}

// who reads the first word of a line.
func who(word string) (Rule, error) {
	r := Rule{Who: word}
	if word == "*" {
		r.kind = all
		return r, nil
	}
	name, value, ok := strings.Cut(word, ":")
	r.kind, r.value = kind(strings.ToLower(name)), value
	before, _, setting := strings.Cut(word, "=")
	switch {
	case !ok && setting && slices.Contains(kinds, kind(strings.ToLower(before))):
		return r, fmt.Errorf("want %s: with a colon, got %q", before, shown(word))
	case !ok && strings.Contains(word, "="):
		return r, fmt.Errorf("want who the limit is for, and then settings, got %q; write * before it for every node", shown(word))
	case ok && r.kind == byKey:
		if err := r.node.UnmarshalText([]byte(string(byKey) + ":" + value)); err != nil || r.node.IsZero() {
			return r, fmt.Errorf("want nodekey: and 64 hex digits, got %q", shown(word))
		}
	case ok && r.kind == byTag:
		if r.value = "tag:" + value; !tagName.MatchString(value) {
			return r, fmt.Errorf("want tag: and a name of letters, digits, dashes, dots and underscores that begins with a letter, got %q", shown(word))
		}
	case ok && (r.kind == byComment || r.kind == byTailnet) && value != "":
		r.value = strings.TrimSpace(value)
	case ok && (r.kind == byComment || r.kind == byTailnet):
		return r, fmt.Errorf(`want a name after %[1]s:, got none; write %[1]s:"my name" without a blank before it`, r.kind)
	default:
		return r, fmt.Errorf(`want nodekey:…, comment:"…", tag:…, tailnet:… or * for all others, got %q`, shown(word))
	}
	return r, nil
}

// limit reads the settings of a line, which come after its first word.
func limit(words []string, defaults relay.NodeLimit) (l relay.NodeLimit, errs []error) {
	l = defaults
	values := make(map[string]string)
	for _, word := range words[1:] {
		name, value, ok := strings.Cut(word, "=")
		name = strings.ToLower(name)
		switch _, twice := values[name]; {
		case !ok || name != "rate" && name != "burst" && name != "connections":
			hint := ""
			if !ok && strings.HasPrefix(words[0], string(byComment)) && len(values) == 0 {
				hint = `; a comment with blanks needs quotes: comment:"my nas"`
			}
			return l, append(errs, fmt.Errorf("want rate=, burst= or connections=, each without blanks such as rate=2Mbit, got %q%s", shown(word), hint))
		case twice:
			errs = append(errs, fmt.Errorf("%s= is set twice; remove one of the two", name))
		case len(value) > longestValue:
			errs = append(errs, fmt.Errorf("%s=: want a short value such as rate=2Mbit, got %q", name, shown(word)))
		default:
			values[name] = value
		}
	}
	if len(errs) > 0 {
		return l, errs
	}
	failed := func(name string, err error) { errs = append(errs, fmt.Errorf("%s=: %w", name, err)) }
	rateFailed := false
	if rate, ok := values["rate"]; ok {
		var err error
		if l.Rate, err = Rate(rate); err != nil {
			failed("rate", err)
			rateFailed = true
		}
		l.Burst = 0
		if l.Rate > 0 {
			l.Burst = DefaultBurst(l.Rate)
		}
	}
	if burst, ok := values["burst"]; ok && !rateFailed {
		var err error
		if l.Rate == 0 {
			err = errors.New("is only used with a rate, but there is none; add rate=, or remove burst=")
		} else {
			l.Burst, err = Burst(burst, l.Rate)
		}
		if err != nil {
			failed("burst", err)
		}
	}
	if connections, ok := values["connections"]; ok {
		var err error
		if l.Connections, err = Connections(connections); err != nil {
			failed("connections", err)
		}
	}
	if len(words) == 1 {
		hint := ""
		if strings.HasPrefix(words[0], string(byKey)) {
			hint = "; a list of keys alone belongs in DERP_ALLOW_KEYS"
		}
		errs = append(errs, fmt.Errorf("want a limit after who it is for, such as rate=2Mbit or connections=4, got none%s", hint))
	}
	return l, errs
}

// shown returns a word for messages. The file may be another than the operator meant,
// and hold a secret.
func shown(word string) string {
	i := strings.IndexAny(word, ":=")
	if i < 0 || i > 16 {
		return redact.Value(word)
	}
	return redact.Secrets(word[:i+1] + redact.Value(word[i+1:]))
}
