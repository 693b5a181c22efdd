package main

import "strings"

// replaceVersion replaces old where it is a whole version. It leaves 11.27.3,
// 1.27.31 and 1.27.3.1 alone when old is 1.27.3.
func replaceVersion(text, old, replacement string) string {
	var b strings.Builder
	for {
		before, after, found := strings.Cut(text, old)
		b.WriteString(before)
		if !found {
			return b.String()
		}
		next := strings.TrimPrefix(after, ".")
		if endsInNumber(before) || next != "" && isDigit(next[0]) {
			b.WriteString(old)
		} else {
			b.WriteString(replacement)
		}
		text = after
	}
}

// endsInNumber reports whether a digit that follows text would continue a number
// or a version.
func endsInNumber(text string) bool {
	return text != "" && (isDigit(text[len(text)-1]) || text[len(text)-1] == '.')
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }
