package main

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
)

// version is a release: three numbers and nothing after them.
type version [3]int

// parseVersion reads v1.104.5. Pre-releases and pseudo-versions are no releases.
func parseVersion(s string) (version, bool) {
	var v version
	rest, ok := strings.CutPrefix(s, "v")
	parts := strings.Split(rest, ".")
	if !ok || len(parts) != len(v) {
		return version{}, false
	}
	for i, part := range parts {
		n, err := strconv.ParseUint(part, 10, 31)
		if err != nil || strconv.Itoa(int(n)) != part {
			return version{}, false
		}
		v[i] = int(n)
	}
	return v, true
}

func (v version) String() string { return fmt.Sprintf("v%d.%d.%d", v[0], v[1], v[2]) }

func (v version) compare(w version) int {
	return cmp.Or(cmp.Compare(v[0], w[0]), cmp.Compare(v[1], w[1]), cmp.Compare(v[2], w[2]))
}

// newest is the highest release that there is. Tailscale's odd minor versions
// are unstable ones, and it skips patch numbers, so the next one is looked for
// and never counted.
func newest(released []string, evenMinor bool) (version, bool) {
	var best version
	found := false
	for _, s := range released {
		v, ok := parseVersion(s)
		if !ok || evenMinor && v[1]%2 != 0 || found && v.compare(best) <= 0 {
			continue
		}
		best, found = v, true
	}
	return best, found
}

// replaceVersion replaces old where it stands by itself, which it does not in
// 11.27.3, in 1.27.31 and in 1.27.3.1.
func replaceVersion(text, old, replacement string) string {
	var b strings.Builder
	for {
		before, after, found := strings.Cut(text, old)
		b.WriteString(before)
		if !found {
			return b.String()
		}
		next := strings.TrimPrefix(after, ".")
		if endsInside(before) || next != "" && isDigit(next[0]) {
			b.WriteString(old)
		} else {
			b.WriteString(replacement)
		}
		text = after
	}
}

// endsInside reports whether a number that follows text goes on with what is
// in it.
func endsInside(text string) bool {
	return text != "" && (isDigit(text[len(text)-1]) || text[len(text)-1] == '.')
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }
