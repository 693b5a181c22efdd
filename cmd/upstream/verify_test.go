package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"derpd/internal/testkit"
)

// Images in a real registry, with the verdicts of the whole program.
func TestVerify(t *testing.T) {
	registry := testkit.StartRegistry(t)
	b := newImageBuilder(t)
	t.Run("image", func(t *testing.T) { verifyImages(t, registry, b) })
	t.Run("registry", func(t *testing.T) { verifyReading(t, registry, b) })
}

// verifyImages checks images with one fault each, which are right otherwise.
func verifyImages(t *testing.T, registry *testkit.Registry, b *imageBuilder) {
	var otherRelease []string
	for _, platform := range published {
		if platform == runtime.GOOS+"/"+runtime.GOARCH {
			otherRelease = append(otherRelease, platform+` prints "derpd 1.104.10-2, tailscale.com v1.104.10"; want "derpd 1.104.10-1, tailscale.com v1.104.10"`)
		} else {
			otherRelease = append(otherRelease, platform+" prints the binary does not contain the text 1.104.10-1")
		}
	}
	for _, test := range []struct {
		name   string
		tag    string                                // good unless it is set
		change func(platform string, i *imageToMake) // of each platform
		index  func(v1.ImageIndex) v1.ImageIndex
		want   []string // lines with the verdict "fail"
	}{
		{name: "good"},
		{name: "moving tag", tag: "1.104"},
		{name: "attestations", index: func(index v1.ImageIndex) v1.ImageIndex {
			unknown := &v1.Platform{OS: "unknown", Architecture: "unknown"}
			return mutate.AppendManifests(index, mutate.IndexAddendum{Add: labelled(t, nil), Descriptor: v1.Descriptor{
				Platform: unknown, Annotations: map[string]string{"vnd.docker.reference.type": "attestation-manifest"},
			}})
		}},
		{name: "platform missing", index: func(index v1.ImageIndex) v1.ImageIndex {
			return mutate.RemoveManifests(index, func(d v1.Descriptor) bool { return d.Platform.Architecture == "386" })
		}, want: []string{"all index linux/386 is missing"}},
		{name: "other platforms", index: func(index v1.ImageIndex) v1.ImageIndex {
			return mutate.AppendManifests(index,
				mutate.IndexAddendum{Add: labelled(t, map[string]string{"a": "1"}), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "riscv64"}}},
				mutate.IndexAddendum{Add: labelled(t, map[string]string{"a": "2"}), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}}},
				mutate.IndexAddendum{Add: labelled(t, map[string]string{"a": "3"})})
		}, want: []string{`all index linux/riscv64 is not a platform of derpd; linux/arm64 is there twice; sha256:DIGEST has no platform`}},
		{name: "other tag", tag: "1.104.10-2", want: []string{
			"all tag 1.104.10-2 names release 1.104.10-1; want one of 1.104.10-1, 1.104.10, 1.104, 1, latest",
		}},
		{name: "not a release", change: on("linux/386", func(i *imageToMake) { i.config.Config.Labels[versionLabel] = "dev" }), want: []string{
			`linux/386 version "dev" is not the name of a release; build with VERSION=1.104.5-1, for example`,
		}},
		{name: "labels", change: on("linux/arm64", func(i *imageToMake) {
			i.config.Config.Labels = map[string]string{versionLabel: "1.104.10-2"}
		}), want: []string{
			"linux/arm64 version 1.104.10-2; other platforms have 1.104.10-1",
			`linux/arm64 title ""; want "derpd"`,
			`linux/arm64 description ""; want "A private DERP relay for Tailscale and Headscale"`,
			`linux/arm64 licenses ""; want "BSD-3-Clause"`,
			`linux/arm64 source "" is not the URL of the sources; build with SOURCE=https://…`,
			`linux/arm64 base image cannot parse hash: ""`,
		}},
		{name: "configuration", change: on("linux/arm/v7", func(i *imageToMake) {
			i.config.Variant = "v6"
			i.config.Config.User = "root"
			i.config.Config.Healthcheck = nil
			i.config.Config.Entrypoint = []string{"/bin/sh", "-c", "/derpd"}
			i.config.Config.Cmd = []string{"serve"}
			i.config.Config.ExposedPorts = nil
			i.config.Config.Volumes = map[string]struct{}{"/var": {}}
			i.config.Config.StopSignal = "SIGKILL"
		}), want: []string{
			`linux/arm/v7 platform "linux/arm/v6"; want "linux/arm/v7"`,
			`linux/arm/v7 user "root"; want "65532:65532"`,
			`linux/arm/v7 entry point "[\"/bin/sh\" \"-c\" \"/derpd\"]"; want "[\"/derpd\"]"`,
			`linux/arm/v7 command "[\"serve\"]"; want "[]"`,
			`linux/arm/v7 health check ""; want "[\"CMD\" \"/derpd\" \"healthcheck\"] interval 10s, timeout 6s, retries 3, start period 30s"`,
			`linux/arm/v7 ports ""; want "3478/udp 443/tcp 80/tcp"`,
			`linux/arm/v7 volumes "/var"; want "/data"`,
			`linux/arm/v7 stop signal "SIGKILL"; want "SIGTERM"`,
		}},
		{name: "no platform", change: on("linux/arm64", func(i *imageToMake) { i.config.OS, i.config.Architecture = "", "" }), want: []string{
			`linux/arm64 platform ""; want "linux/arm64"`,
		}},
		{name: "reproducible date", change: on("linux/386", func(i *imageToMake) { i.config.Created = v1.Time{Time: time.Unix(0, 0).UTC()} }), want: []string{
			"linux/386 created 1970-01-01T00:00:00Z is not the time of the build; unset SOURCE_DATE_EPOCH",
		}},
		{name: "future", change: on("linux/386", func(i *imageToMake) { i.config.Created = v1.Time{Time: time.Date(2999, 1, 1, 0, 0, 0, 0, time.UTC)} }), want: []string{
			"linux/386 created 2999-01-01T00:00:00Z is in the future",
		}},
		{name: "large when compressed", change: on("linux/arm64", func(i *imageToMake) { i.more = noise(maxCompressed - 1<<16) }), want: []string{
			"linux/arm64 size MEGABYTES compressed; want at most 9.0 MB",
		}},
		{name: "large layer", change: on("linux/arm64", func(i *imageToMake) { i.more = noise(maxCompressed) }), want: []string{
			"linux/arm64 size layer sha256:DIGEST has BYTES bytes; want at most 9.0 MB",
		}},
		{name: "large configuration", change: on("linux/386", func(i *imageToMake) { i.config.Author = string(make([]byte, maxConfig)) }), want: []string{
			"linux/386 read the configuration has BYTES bytes; at most 1048576 are read",
		}},
		{name: "large when unpacked", change: on("linux/arm64", func(i *imageToMake) { i.more = make([]byte, maxUnpacked) }), want: []string{
			"linux/arm64 size more than 22.0 MB unpacked",
		}},
		{name: "large without files", change: on("linux/arm64", func(i *imageToMake) { i.padding = 2 * maxUnpacked }), want: []string{
			"linux/arm64 size more than 22.0 MB unpacked",
		}},
		{name: "shell", change: on("linux/amd64", func(i *imageToMake) { i.shell = b.programs["linux/amd64"]["1.104.10-1"] }), want: []string{
			"linux/amd64 programs /usr/bin/busybox; want only /derpd",
		}},
		{name: "not executable", change: on("linux/amd64", func(i *imageToMake) { i.mode = 0o644 }), want: []string{
			"linux/amd64 programs /derpd has mode 644; want it executable for everybody",
		}},
		{name: "script", change: on("linux/amd64", func(i *imageToMake) { i.program = []byte("#!/bin/sh\n") }), want: []string{
			"linux/amd64 programs /derpd is not a program",
		}},
		{name: "volume of root", change: on("linux/arm64", func(i *imageToMake) { i.owner = 0 }), want: []string{
			"linux/arm64 files /data belongs to 0:0; want 65532:65532",
		}},
		{name: "no root certificates", change: on("linux/arm64", func(i *imageToMake) { i.roots = nil }), want: []string{
			"linux/arm64 files /etc/ssl/certs/ca-certificates.crt is missing, so that no certificate can be obtained",
		}},
		{name: "binary of another platform", change: on("linux/arm64", func(i *imageToMake) { i.program = b.programs["linux/arm/v7"]["1.104.10-1"] }), want: []string{
			"linux/arm64 binary built for linux/arm/v7; want linux/arm64",
		}},
		{name: "binary of another release", change: func(platform string, i *imageToMake) { i.program = b.programs[platform]["1.104.10-2"] }, want: otherRelease},
		{name: "binary of another upstream", change: on("linux/386", func(i *imageToMake) { i.program = b.programs["linux/386"]["1.104.11-1"] }), want: []string{
			"linux/386 upstream tailscale.com v1.104.11 is in the binary; release 1.104.10-1 needs v1.104.10",
			"linux/386 prints the binary does not contain the text 1.104.10-1",
		}},
		{name: "other configuration of layers", change: on("linux/386", func(i *imageToMake) { i.diffIDs = true }), want: []string{
			"linux/386 read layer sha256:DIGEST: unpacked digest is sha256:DIGEST, but the configuration names sha256:DIGEST",
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			index := b.index(t, test.change)
			if test.index != nil {
				index = test.index(index)
			}
			tag := test.tag
			if tag == "" {
				tag = "1.104.10-1"
			}
			ref := "ghcr.io/someone/" + strings.ReplaceAll(test.name, " ", "-") + ":" + tag
			push(t, registry, ref, index)
			out, err := verifyAt(t, "http://"+registry.Host, ref)
			if got := failures(out); !slices.Equal(got, test.want) {
				t.Errorf("failed:\n%s\nwant\n%s\nin\n%s", strings.Join(got, "\n"), strings.Join(test.want, "\n"), out)
			}
			if (err == nil) != (len(test.want) == 0) {
				t.Errorf("error is %v", err)
			}
		})
	}
}

// verifyReading checks a good image in a registry with faults.
func verifyReading(t *testing.T, registry *testkit.Registry, b *imageBuilder) {
	address := "http://" + registry.Host
	const image = "ghcr.io/someone/derpd:1.104.10-1"
	good := b.index(t, nil)
	push(t, registry, image, good)
	digest, err := good.Digest()
	if err != nil {
		t.Fatal(err)
	}

	t.Run("tags of one image", func(t *testing.T) {
		push(t, registry, "ghcr.io/someone/derpd:latest", good)
		out, err := verifyAt(t, address, image, "ghcr.io/someone/derpd:latest", "ghcr.io/someone/derpd@"+digest.String())
		if err != nil || strings.Count(out, "linux/386     user ") != 1 || strings.Count(out, digest.String()+", checked above") != 2 {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("one manifest", func(t *testing.T) {
		ref := reference(t, registry, "ghcr.io/someone/plain:1.104.10-1")
		if err := remote.Write(ref, b.image(t, "linux/amd64", nil)); err != nil {
			t.Fatal(err)
		}
		refused(t, address, "ghcr.io/someone/plain:1.104.10-1",
			"all index one manifest for one platform (application/vnd.docker.distribution.manifest.v2+json); want an index for linux/386, linux/amd64, linux/arm/v7, linux/arm64")
	})
	t.Run("missing", func(t *testing.T) {
		refused(t, address, "ghcr.io/someone/derpd:1.104.10-9", "all read no such image")
	})
	t.Run("all problems at once", func(t *testing.T) {
		out, err := verifyAt(t, address, "ghcr.io/someone/missing:1", image, "ghcr.io/someone/absent:1")
		if got := len(failures(out)); err == nil || got != 2 || !strings.Contains(err.Error(), fmt.Sprintf("2 of %d checks failed", strings.Count(out, "\n")-3)) {
			t.Errorf("%d failures, error %v in\n%s", got, err, out)
		}
	})
	t.Run("token", func(t *testing.T) {
		var tokens int
		behind := before(t, address, func(w http.ResponseWriter, r *http.Request) bool {
			switch {
			case r.URL.Path == "/token":
				tokens++
				_, _ = fmt.Fprint(w, `{"token":"for everybody"}`)
			case r.Header.Get("Authorization") != "Bearer for everybody":
				w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token",service="images"`)
				http.Error(w, "", http.StatusUnauthorized)
			default:
				return false
			}
			return true
		})
		if out, err := verifyAt(t, behind, image); err != nil || tokens == 0 {
			t.Errorf("%d tokens, error %v in\n%s", tokens, err, out)
		}
	})
	t.Run("private", func(t *testing.T) {
		behind := before(t, address, func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token",service="images"`)
			http.Error(w, "", http.StatusUnauthorized)
			return true
		})
		out, err := verifyAt(t, behind, image)
		if got := failures(out); err == nil || len(got) != 1 || !strings.Contains(got[0], "401 Unauthorized") {
			t.Errorf("%v\n%s", err, out)
		}
	})
	for name, path := range map[string]string{"registry hangs": "/v2/", "blob hangs": "/v2/someone/derpd/blobs/"} {
		t.Run(name, func(t *testing.T) {
			ended := make(chan struct{})
			behind := before(t, address, func(_ http.ResponseWriter, r *http.Request) bool {
				if !strings.HasPrefix(r.URL.Path, path) {
					return false
				}
				select {
				case <-r.Context().Done():
				case <-ended:
				}
				return true
			})
			t.Cleanup(func() { close(ended) }) // before the server closes
			out, err := verifyAt(t, behind, "--timeout", "1s", image)
			got := failures(out)
			if err == nil || len(got) == 0 || !strings.Contains(got[0], "no answer within 1s; try again later, or set --timeout") {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	for _, path := range []string{"/v2/", "/v2/someone/derpd/blobs/"} {
		t.Run("interrupted at "+path, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			behind := before(t, address, func(_ http.ResponseWriter, r *http.Request) bool {
				if !strings.HasPrefix(r.URL.Path, path) {
					return false
				}
				cancel()
				<-r.Context().Done()
				return true
			})
			if err := run(ctx, []string{"--registry", behind, "verify", image}, nil, new(bytes.Buffer)); !errors.Is(err, context.Canceled) {
				t.Errorf("error is %v", err)
			}
		})
	}
	// Last, because it damages what the other images share.
	t.Run("damaged blob", func(t *testing.T) {
		layers, err := b.image(t, "linux/arm64", nil).Layers()
		if err != nil {
			t.Fatal(err)
		}
		layer, err := layers[1].Digest()
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(registry.Storage, "docker", "registry", "v2", "blobs", "sha256", layer.Hex[:2], layer.Hex, "data")
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		content[len(content)/2] ^= 1
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, address, image, "linux/arm64 read layer sha256:DIGEST: error verifying sha256 checksum after reading "+fmt.Sprint(len(content))+
			` bytes; got "DIGEST", want "DIGEST"`)
	})
}

// A negative size in a manifest means an unknown size to the library, which then reads
// as long as the registry sends.
func TestNegativeSize(t *testing.T) {
	manifest := &v1.Manifest{Layers: []v1.Descriptor{{Size: 100}, {Size: -1}}}
	if size, err := download(manifest); err == nil {
		t.Errorf("size %d, want an error", size)
	}
	v := &verifier{stdout: io.Discard}
	img := negative{labelled(t, nil)}
	if _, err := v.platform(t.Context(), "linux/amd64", img, ""); err == nil || !strings.Contains(err.Error(), "the configuration has -1 bytes") {
		t.Errorf("error is %v", err)
	}
}

// negative is an image whose configuration has a negative size.
type negative struct{ v1.Image }

func (n negative) Manifest() (*v1.Manifest, error) {
	return &v1.Manifest{Config: v1.Descriptor{Size: -1}}, nil
}

// before returns the URL of a server before a registry, which answers the requests for
// which handled returns true.
func before(t *testing.T, registry string, handled func(http.ResponseWriter, *http.Request) bool) string {
	t.Helper()
	target, err := url.Parse(registry)
	if err != nil {
		t.Fatal(err)
	}
	next := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) }}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !handled(w, r) {
			next.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(server.Close)
	return server.URL
}

// verifyAt runs the program on images of a registry. Flags may precede the images.
func verifyAt(t *testing.T, registry string, images ...string) (string, error) {
	t.Helper()
	args := []string{"--registry", registry}
	for strings.HasPrefix(images[0], "--") {
		args, images = append(args, images[:2]...), images[2:]
	}
	var stdout bytes.Buffer
	err := run(t.Context(), slices.Concat(args, []string{"verify"}, images), nil, &stdout)
	return stdout.String(), err
}

func refused(t *testing.T, registry, image, want string) {
	t.Helper()
	out, err := verifyAt(t, registry, image)
	if got := failures(out); err == nil || !slices.Equal(got, []string{want}) {
		t.Errorf("error %v, failed:\n%s\nwant\n%s\nin\n%s", err, strings.Join(got, "\n"), want, out)
	}
}

// failures returns the checks that failed, without digests and numbers that vary.
func failures(out string) []string {
	var failed []string
	for line := range strings.Lines(out) {
		fields := strings.Fields(line)
		if fields[0] != "fail" {
			continue
		}
		text := regexp.MustCompile(`[0-9a-f]{64}`).ReplaceAllString(strings.Join(fields[1:], " "), "DIGEST")
		text = regexp.MustCompile(`sha256:DIGEST", want "sha256:DIGEST`).ReplaceAllString(text, `DIGEST", want "DIGEST`)
		text = regexp.MustCompile(`has [0-9]+ bytes`).ReplaceAllString(text, "has BYTES bytes")
		failed = append(failed, regexp.MustCompile(`[0-9.]+ MB compressed`).ReplaceAllString(text, "MEGABYTES compressed"))
	}
	return failed
}

func reference(t *testing.T, registry *testkit.Registry, image string) name.Reference {
	t.Helper()
	ref, err := images{registry: "http://" + registry.Host}.reference(image)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func push(t *testing.T, registry *testkit.Registry, image string, index v1.ImageIndex) {
	t.Helper()
	if err := remote.WriteIndex(reference(t, registry, image), index); err != nil {
		t.Fatal(err)
	}
}
