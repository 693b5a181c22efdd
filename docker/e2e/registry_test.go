//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"derpd/internal/testkit"
)

// platforms are those of a release, as in the release workflow.
var platforms = []string{"linux/amd64", "linux/arm64", "linux/arm/v7", "linux/386"}

// hub is a real registry from which the engine pulls.
type hub struct{ *testkit.Registry }

func startHub(t *testing.T) hub {
	t.Helper()
	return hub{testkit.StartRegistry(t)}
}

// push gives an image of the engine a name in the registry. The engine forgets that
// name again.
func (h hub) push(t *testing.T, image, as string) string {
	t.Helper()
	ref := h.Host + "/" + as
	docker(t, "tag", image, ref)
	docker(t, "push", "--quiet", ref)
	docker(t, "rmi", ref)
	return ref
}

// move gives a tag of the registry to another image of the registry.
func (h hub) move(t *testing.T, tag, image string) {
	t.Helper()
	to, err := name.NewTag(tag)
	if err != nil {
		t.Fatal(err)
	}
	found, err := remote.Get(parse(t, image), remote.WithContext(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Tag(to, found, remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
}

func parse(t *testing.T, image string) name.Reference {
	t.Helper()
	ref, err := name.ParseReference(image)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// watchtower looks for a newer image of a container, as Watchtower 1.22 does. It
// compares the digest in the registry with that of the container's image (CompareDigest
// in its pkg/registry/digest), pulls, and replaces the container if the name now means
// another image. It returns whether there was one.
func watchtower(t *testing.T, container string) (bool, error) {
	ctx := t.Context()
	inspect := func(kind, what string, into any) error {
		out, err := run(ctx, dockerTimeout, kind, "inspect", "--format", "{{json .}}", what)
		if err != nil {
			return fmt.Errorf("inspecting %s: %w\n%s", what, err, out)
		}
		return json.Unmarshal([]byte(out), into)
	}
	var runs struct {
		Image  string
		Config struct {
			Image  string
			Labels map[string]string
		}
	}
	var old, latest struct {
		ID                    string
		RepoDigests, RepoTags []string
	}
	if err := inspect("container", container, &runs); err != nil {
		return false, err
	}
	if runs.Config.Labels["com.centurylinklabs.watchtower.enable"] != "true" {
		return false, fmt.Errorf("%s is not enabled for updates: labels %v", container, runs.Config.Labels)
	}
	if err := inspect("image", runs.Image, &old); err != nil {
		return false, err
	}
	ref, err := name.ParseReference(runs.Config.Image)
	if err != nil {
		return false, err
	}
	found, err := remote.Head(ref, remote.WithContext(ctx))
	if err != nil {
		return false, err
	}
	if slices.Contains(old.RepoDigests, ref.Context().Name()+"@"+found.Digest.String()) {
		return false, nil
	}
	if out, err := run(ctx, dockerTimeout, "pull", "--quiet", runs.Config.Image); err != nil {
		return false, fmt.Errorf("pulling %s: %w\n%s", runs.Config.Image, err, out)
	}
	if err := inspect("image", runs.Config.Image, &latest); err != nil {
		return false, err
	}
	if latest.ID == runs.Image {
		return false, nil
	}
	replace(t, container)
	// Watchtower removes the old image with all its names, which this machine may need.
	if err := inspect("image", runs.Image, &old); err != nil {
		return false, err
	}
	if len(old.RepoTags) == 0 {
		if out, err := run(ctx, dockerTimeout, "rmi", "--force", runs.Image); err != nil {
			return false, fmt.Errorf("removing the old image: %w\n%s", err, out)
		}
	}
	return true, nil
}

// published makes a release as the release workflow does, in a real registry: names by
// cmd/upstream, an image for each platform by the Dockerfile, and an index. cmd/upstream
// and the engine then read the release as people do.
func published(t *testing.T, r *row) {
	h := startHub(t)
	upstream := filepath.Join(t.TempDir(), "upstream")
	golang(t, "build", "-o", upstream, "./cmd/upstream")
	version := golang(t, "list", "-m", "-f", "{{.Version}}", "tailscale.com")
	release := strings.TrimPrefix(version, "v") + "-1"
	ask := func(args ...string) (string, map[string]string) {
		t.Helper()
		return askUpstream(t, upstream, append([]string{"--registry", "http://" + h.Host}, args...)...)
	}

	_, names := ask("tags", release, h.Host+"/someone/derpd")
	tags := strings.Split(names["tags"], ",")
	base := h.pushBase(t)
	_, based := ask("base")
	started := time.Now()
	index := v1.ImageIndex(empty.Index)
	for _, platform := range platforms {
		index = mutate.AppendManifests(index, h.build(t, platform,
			"--build-arg", "VERSION="+names["version"], "--build-arg", "SOURCE=https://github.com/someone/derpd",
			"--build-arg", "BASE_IMAGE="+base+"@"+based["digest"], "--label", "org.opencontainers.image.base.digest="+based["digest"]))
	}
	r.saw("%d platforms built in %v", len(platforms), time.Since(started).Round(time.Second))
	if err := remote.WriteIndex(parse(t, tags[0]), index, remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
	ask(append([]string{"copy"}, tags...)...)

	verdicts, _ := ask(append([]string{"verify"}, tags...)...)
	t.Logf("upstream verify:\n%s", verdicts)
	for _, platform := range platforms {
		if !strings.Contains(verdicts, "\nok    "+fmt.Sprintf("%-14s%-15s", platform, "prints")) {
			t.Errorf("the version of %s was not checked", platform)
		}
	}
	r.saw("%s", verdicts[strings.LastIndex(strings.TrimSpace(verdicts), "\n")+1:len(verdicts)-1])
	if _, again := ask("base", "someone/derpd"); again["changed"] != "false" {
		t.Errorf("upstream base: outputs are %v, want changed=false", again)
	}

	digest, err := index.Digest()
	if err != nil {
		t.Fatal(err)
	}
	text := "derpd " + release + ", tailscale.com " + version
	for _, ref := range append(tags, h.Host+"/someone/derpd@"+digest.String()) {
		docker(t, "pull", "--quiet", ref)
		if got := docker(t, "run", "--rm", "--label", ownerLabel+"="+project(t), ref, "version"); got != text {
			t.Errorf("%s prints %q, want %q", ref, got, text)
		}
		docker(t, "rmi", ref)
	}
	for _, platform := range platforms {
		docker(t, "pull", "--quiet", "--platform", platform, tags[0])
		got := docker(t, "image", "inspect", "--format", "{{.Os}}/{{.Architecture}}", tags[0])
		if got != strings.TrimSuffix(platform, "/v7") {
			t.Errorf("the engine pulls %s for %s", got, platform)
		}
		docker(t, "rmi", tags[0])
	}
	r.saw("pulled by %d tags and by digest", len(tags))
}

// pushBase copies the base image to the registry, under the Dockerfile's name for it, and
// returns the repository. BASE_IMAGE names a mirror, as for `make image`.
func (h hub) pushBase(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	line := regexp.MustCompile(`(?m)^ARG BASE_IMAGE=(\S+)$`).FindSubmatch(text)
	if line == nil {
		t.Fatal("the Dockerfile has no line ARG BASE_IMAGE=IMAGE")
	}
	base := parse(t, string(line[1]))
	mirror := os.Getenv("BASE_IMAGE")
	if mirror == "" {
		mirror = string(line[1])
	}
	if _, err := run(t.Context(), dockerTimeout, "image", "inspect", mirror); err != nil {
		docker(t, "pull", "--quiet", mirror) // BuildKit keeps images elsewhere
	}
	at := base.Context().RepositoryStr()
	h.push(t, mirror, at+":"+base.Identifier())
	return h.Host + "/" + at
}

// build builds the image for one platform, and returns it as a part of an index.
func (h hub) build(t *testing.T, platform string, flags ...string) mutate.IndexAddendum {
	t.Helper()
	target, err := v1.ParsePlatform(platform)
	if err != nil {
		t.Fatal(err)
	}
	part := project(t) + ":" + strings.ReplaceAll(platform, "/", "-")
	// The arguments that BuildKit derives from --platform. The classic builder refuses to
	// copy from a stage of another platform, so the image's configuration has the
	// engine's platform at first.
	args := slices.Concat([]string{
		"build", "--quiet", "--build-arg", "GOPROXY", "--build-arg", "GO_IMAGE",
		"--build-arg", "TARGETOS=" + target.OS, "--build-arg", "TARGETARCH=" + target.Architecture, "--build-arg", "TARGETVARIANT=" + target.Variant,
	},
		flags, []string{"--tag", part, "."})
	if out, err := run(t.Context(), upTimeout, args...); err != nil {
		t.Fatalf("building for %s: %v\n%s", platform, err, out)
	}
	t.Cleanup(func() { _, _ = run(context.Background(), dockerTimeout, "rmi", part) })
	img, err := remote.Image(parse(t, h.push(t, part, part)), remote.WithContext(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Variant = target.OS, target.Architecture, target.Variant
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	return mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: target}}
}

// golang runs a go command and returns its output.
func golang(t *testing.T, args ...string) string {
	t.Helper()
	command := exec.CommandContext(t.Context(), "go", args...)
	command.Dir = "../.."
	out, err := command.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			out = exit.Stderr
		}
		t.Fatalf("go %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// askUpstream runs cmd/upstream, and returns its output and its outputs for a workflow.
func askUpstream(t *testing.T, program string, args ...string) (string, map[string]string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "output")
	command := exec.CommandContext(t.Context(), program, args...)
	command.Dir = "../.."
	command.Env = append(os.Environ(), "GITHUB_OUTPUT="+file)
	out, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("upstream %v: %v\n%s", args, err, out)
	}
	outputs := make(map[string]string)
	text, _ := os.ReadFile(file) // not every command has outputs
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		outputs[key] = value
	}
	return string(out), outputs
}
