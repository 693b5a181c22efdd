package config

import (
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// bare removes quotes and invisible characters from the ends of a value, and
// returns what they are. Such a value is refused: DERP_DATA_DIR='"/data"' would
// make a directory called `"`. `docker run --env-file` and Compose's list form
// pass on quotes and blanks; editors and web pages add the others. The bare value
// is parsed all the same, so that its other problems are reported too.
//
// If lines is set, the value may have several lines: line breaks are allowed.
func bare(value string, lines bool) (string, []string) {
	var faults []string
	note := func(fault string) {
		if !slices.Contains(faults, fault) {
			faults = append(faults, fault)
		}
	}
	if strings.ContainsRune(value, 0) {
		note("contains a NUL character")
		value = strings.ReplaceAll(value, "\x00", "")
	}
	for value != "" {
		first, firstSize := utf8.DecodeRuneInString(value)
		last, lastSize := utf8.DecodeLastRuneInString(value)
		switch {
		case lines && first == '\n':
			value = value[firstSize:]
		case lines && last == '\n':
			value = value[:len(value)-lastSize]
		case invisible(first):
			note("begins with " + runeName(first))
			value = value[firstSize:]
		case invisible(last):
			note("ends with " + runeName(last))
			value = value[:len(value)-lastSize]
		case quotes(first, last):
			note("is in quotes")
			value = value[firstSize:max(firstSize, len(value)-lastSize)]
		case !lines && strings.Contains(value, "\r"):
			note("contains a carriage return")
			value = strings.ReplaceAll(value, "\r", "")
		default:
			return value, faults
		}
	}
	return "", faults
}

// quotes reports whether a value that begins with first and ends with last is in
// quotes. A pair is two equal ASCII quotes, or any two of which one is typographic.
func quotes(first, last rune) bool {
	const ascii, typographic = `"'`, "“”„‟‘’‚‛«»‹›「」『』＂＇"
	isQuote := func(r rune) bool { return strings.ContainsRune(ascii+typographic, r) }
	return isQuote(first) && isQuote(last) && (first == last || strings.ContainsRune(typographic, first) || strings.ContainsRune(typographic, last))
}

// invisible reports whether r shows nothing: blanks, control and format
// characters. Tags are not among them: flags of emoji end with one.
func invisible(r rune) bool {
	if r >= 0xE0000 && r <= 0xE007F {
		return false
	}
	return unicode.IsSpace(r) || unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || strings.ContainsRune("\u115f\u1160\u2800\u3164\uffa0", r)
}

var runeNames = map[rune]string{
	' ':      "a space",
	'\t':     "a tab",
	'\n':     "a newline",
	'\r':     "a carriage return",
	'\u00a0': "a non-breaking space",
	'\u200b': "a zero-width space",
	'\ufeff': "a byte order mark",
}

func runeName(r rune) string {
	if name, ok := runeNames[r]; ok {
		return name
	}
	return fmt.Sprintf("the invisible character U+%04X", r)
}

// bareValue refuses a value of the environment that is not bare, without showing
// it: it may be a secret.
func (p *problems) bareValue(name, value string, lines bool) string {
	value, faults := bare(value, lines)
	if len(faults) > 0 {
		p.add(name, "the value %s; write it bare: `docker run --env-file` and Compose's list form keep quotes and blanks, and Windows line ends are carriage returns", strings.Join(faults, " and "))
	}
	return value
}

// bareContent is bareValue for the content of a file. The line break that an
// editor leaves at the end is not part of the value. Around several lines, blanks
// are not part of it either.
func (p *problems) bareContent(name, path, content string, lines bool) string {
	content = strings.TrimRight(content, "\r\n")
	if lines {
		content = strings.Trim(content, " \t\r\n")
	}
	if content == "" {
		p.add(name, "%s is empty; write the value into it", path)
		return ""
	}
	value, faults := bare(content, lines)
	if len(faults) > 0 {
		p.add(name, "the content of %s %s; write the bare value into the file", path, strings.Join(faults, " and "))
	}
	return value
}
