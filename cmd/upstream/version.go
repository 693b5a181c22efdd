package main

import (
	"strings"

	"golang.org/x/mod/semver"
)

// isRelease reports whether a version is only three numbers. Pre-releases and
// pseudo-versions are not releases.
func isRelease(version string) bool {
	return semver.Canonical(version) == version && version != "" && semver.Prerelease(version) == ""
}

// newest returns the highest release, or "" if there is none. Odd minor versions of
// Tailscale are unstable.
func newest(released []string, evenMinor bool) string {
	best := ""
	for _, v := range released {
		if isRelease(v) && (!evenMinor || hasEvenMinor(v)) && semver.Compare(v, best) > 0 {
			best = v
		}
	}
	return best
}

// hasEvenMinor reports whether the second number of a valid version is even.
func hasEvenMinor(version string) bool {
	minor := semver.MajorMinor(version)
	return strings.ContainsRune("02468", rune(minor[len(minor)-1]))
}

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
