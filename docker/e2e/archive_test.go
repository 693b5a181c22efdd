//go:build e2e

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// makeArchive makes and unpacks an archive in the directory $0, a copy of the sources.
const makeArchive = `
git ls-files -z | tar --create --null --files-from - | tar --extract --directory "$0"
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) make --silent -C "$0" dist VERSION=1.2.3-4 ARCHES="$(go env GOARCH)"
cd "$0/dist"
sha256sum --check --strict SHA256SUMS
tar --extract --file *.tar.gz --strip-components 1
`

// archive runs the program of a release's archive in a container that has none of its
// own: the base of the image, Debian without a shell. The other files are those of the
// repository, which have tests.
func archive(t *testing.T, r *row) {
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", makeArchive, dir)
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	dist := filepath.Join(dir, "dist")
	for name, source := range map[string]string{"derpd.service": "docker/derpd.service", "env.example": "docker/env.example", "LICENSE": "LICENSE"} {
		got, err := os.ReadFile(filepath.Join(dist, name))
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(filepath.Join("../..", source))
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != string(want) {
			t.Errorf("%s is not %s", name, source)
		}
	}
	for command, want := range map[string]string{
		"version": "derpd 1.2.3-4, tailscale.com v1.",
		"env":     "DERP_ADDR=:443  # default\n",
	} {
		got := docker(t, "run", "--rm", "--network", "none", "--label", ownerLabel+"="+project(t),
			"--volume", dist+":/archive:ro", "--entrypoint", "/archive/derpd", image(), command)
		if !strings.Contains(got, want) {
			t.Errorf("derpd %s prints\n%s\nwant %s", command, got, want)
		}
		r.saw("derpd %s", command)
	}
}
