package main

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"derpd/internal/testkit"
)

// login gives the test's process a docker configuration, as `docker login` writes it,
// with a login for one registry.
func login(t *testing.T, host, user, password string) {
	t.Helper()
	dir := t.TempDir()
	auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
	if err := os.WriteFile(filepath.Join(dir, "config.json"), fmt.Appendf(nil, `{"auths": {%q: {"auth": %q}}}`, host, auth), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", dir)
}

// upstream runs the program.
func upstream(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var stdout bytes.Buffer
	err := run(t.Context(), args, nil, &stdout)
	return stdout.String(), err
}

// TestPrivateRegistry copies a release between two real registries, one of which is
// private, and checks it there.
func TestPrivateRegistry(t *testing.T) {
	const user, password = "publisher", "s3cret"
	public, private := testkit.StartRegistry(t), testkit.StartPrivateRegistry(t, user, password)
	b := newImageBuilder(t)
	index := mutate.AppendManifests(b.index(t, nil), mutate.IndexAddendum{Add: labelled(t, nil), Descriptor: v1.Descriptor{
		Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}, Annotations: map[string]string{"vnd.docker.reference.type": "attestation-manifest"},
	}})
	digest, err := index.Digest()
	if err != nil {
		t.Fatal(err)
	}
	push(t, public, "someone/derpd:1.104.10-1", index)
	image := public.Host + "/someone/derpd@" + digest.String()
	names := []string{private.Host + "/other/relay:1.104.10-1", private.Host + "/other/relay:latest"}
	verify := append([]string{"verify"}, names...)

	login(t, private.Host, user, password)
	copied := append([]string{"copy", image}, names...)
	for range 2 { // the second time, everything is there
		if out, err := upstream(t, copied...); err != nil || out != strings.Join(names, "\n")+"\n" {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	out, err := upstream(t, verify...)
	if err != nil || strings.Count(out, digest.String()) != 2 || !strings.Contains(out, "; 1 attestations") {
		t.Errorf("%v\n%s", err, out)
	}
	const note = "note  all           public         not readable without a login; people can pull it when you make it public\n"
	if strings.Count(out, note) != 2 {
		t.Errorf("no note in\n%s", out)
	}
	if out, err := upstream(t, "verify", image); err != nil || strings.Contains(out, "note") {
		t.Errorf("%v\n%s", err, out)
	}
	if labels, err := (images{}).labels(t.Context(), names[1]); err != nil || labels[versionLabel] != "1.104.10-1" {
		t.Errorf("labels %v, error %v", labels, err)
	}
	if got, err := (images{}).digest(t.Context(), names[1]); err != nil || got != digest.String() {
		t.Errorf("digest %s, error %v; want %s", got, err, digest)
	}

	t.Run("script", func(t *testing.T) { publishes(t, b, image, private.Host) })

	for _, host := range []string{private.Host, "other.example.com"} {
		login(t, host, user, "wrong")
		if out, err := upstream(t, verify...); err == nil || strings.Count(out, "; use docker login, or make the image public\n") != 2 {
			t.Errorf("login for %s: %v\n%s", host, err, out)
		}
		out, err := upstream(t, copied...)
		if err == nil || out != "" || !strings.Contains(err.Error(), "copying "+image+" to "+names[0]+": ") || strings.Contains(err.Error(), password) {
			t.Errorf("login for %s: %v\n%s", host, err, out)
		}
	}
}

// publishes runs the script .github/publish, in which only cosign is a double.
func publishes(t *testing.T, b *imageBuilder, image, host string) {
	t.Helper()
	dir := t.TempDir()
	script, err := os.ReadFile("../../.github/publish")
	if err != nil {
		t.Fatal(err)
	}
	gotool, err := exec.LookPath("go")
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		".github/publish": string(script),
		"bin/go":          "#!/bin/sh\n[ \"$1\" != run ] || exit 1 # would run with the dependencies of go.mod\nexec " + gotool + " \"$@\"\n",
		"bin/cosign":      "#!/bin/sh\necho \"cosign $*\"\n",
		"go.mod":          "module derpd\n\ngo 1.27\n\nrequire tailscale.com v1.104.10\n",
	} {
		file := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, []byte(content), 0o700)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(self, filepath.Join(dir, "bin", "upstream")); err != nil {
		t.Fatal(err)
	}
	publish := func(image, repository string) (string, error) {
		cmd := exec.CommandContext(t.Context(), filepath.Join(dir, ".github", "publish"), filepath.Join(dir, "bin", "upstream"), image, "1.104.10-1", repository)
		cmd.Env = append(os.Environ(), "PATH="+filepath.Join(dir, "bin")+":"+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	_, digest, _ := strings.Cut(image, "@")

	// The moving names come last.
	name := host + "/third/derpd"
	out, err := publish(image, name)
	var did []string
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "cosign ") || strings.HasSuffix(line, "checks passed\n") || strings.Contains(line, "/third/derpd:") {
			did = append(did, strings.TrimSpace(line))
		}
	}
	want := []string{"checks passed", name + ":1.104.10-1", "cosign sign --yes " + name + "@" + digest}
	for range 2 { // copied, then checked
		for _, tag := range []string{"1.104.10-1", "1.104.10", "1.104", "1", "latest"} {
			want = append(want, name+":"+tag)
		}
	}
	want = append(want, "checks passed")
	for i := range did {
		if strings.HasSuffix(did[i], "checks passed") {
			did[i] = "checks passed"
		}
	}
	if err != nil || !slices.Equal(did, want) {
		t.Errorf("%v\n%s\nwant\n%s\nin\n%s", err, strings.Join(did, "\n"), strings.Join(want, "\n"), out)
	}

	// The script has rights, so it does not run the program of the image.
	if line := regexp.MustCompile(runtime.GOOS + "/" + runtime.GOARCH + " +prints .*").FindString(out); !strings.HasSuffix(line, "; not run, found in the binary") {
		t.Errorf("%q", line)
	}

	// A bad image gets no name.
	source, _, _ := strings.Cut(image, "/")
	push(t, &testkit.Registry{Host: source}, "someone/bad:1.104.10-1", b.index(t, on("linux/arm64", func(i *imageToMake) { i.config.Config.User = "root" })))
	out, err = publish(source+"/someone/bad:1.104.10-1", host+"/bad/derpd")
	if err == nil || strings.Contains(out, "cosign") || !strings.Contains(out, "do not announce this release") {
		t.Errorf("%v\n%s", err, out)
	}
	if _, err := (images{}).digest(t.Context(), host+"/bad/derpd:1.104.10-1"); !errors.Is(err, errNoImage) {
		t.Errorf("error is %v", err)
	}
}

func TestCopyRefuses(t *testing.T) {
	registry, _ := startRegistry(t)
	for _, tt := range []struct{ image, name, want string }{
		{"ghcr.io/someone/missing", "ghcr.io/someone/copy:1", "copying ghcr.io/someone/missing to ghcr.io/someone/copy:1: no such image"},
		{"ghcr.io/someone/other", "ghcr.io/someone/copy:1", "copying ghcr.io/someone/other to ghcr.io/someone/copy:1: "},
		{"ghcr.io/someone/derpd", "ghcr.io/someone/copy@sha256:" + strings.Repeat("13", 32), "copy: not a name with a tag (got "},
		{"ghcr.io/someone/derpd", "ghcr.io/Someone/copy:1", "could not parse reference"},
		{"ghcr.io/Someone/derpd", "ghcr.io/someone/copy:1", "could not parse reference"},
	} {
		if out, err := upstream(t, "--registry", registry, "copy", tt.image, tt.name); err == nil || !strings.HasPrefix(err.Error(), tt.want) || out != "" {
			t.Errorf("%s to %s: %v, want %s\n%s", tt.image, tt.name, err, tt.want, out)
		}
	}
}
