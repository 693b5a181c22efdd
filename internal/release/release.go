// Package release asks whether a newer release of derpd is out.
//
// release.go has the rules for names of releases. ask.go asks and compares.
// github.go asks the repository of a published build, and proxy.go asks a module
// proxy for the releases of Tailscale.
package release

import (
	"regexp"
	"strings"

	"golang.org/x/mod/semver"
)

// Module is the module whose releases derpd follows.
const Module = "tailscale.com"

// Name matches the name of a release, such as 1.104.5-2: the Tailscale release,
// and the number of derpd's release on that Tailscale release.
var Name = regexp.MustCompile(`^(\d+)\.(\d+)\.(\d+)-([1-9]\d*)$`)

// IsStable reports whether a version is only three numbers. Pre-releases and
// pseudo-versions are not stable.
func IsStable(version string) bool {
	return semver.Canonical(version) == version && version != "" && semver.Prerelease(version) == ""
}

// Newest returns the highest stable version, or "" if there is none. Odd minor
// versions of Tailscale are unstable.
func Newest(versions []string, evenMinor bool) string {
	best := ""
	for _, v := range versions {
		if IsStable(v) && (!evenMinor || hasEvenMinor(v)) && semver.Compare(v, best) > 0 {
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
