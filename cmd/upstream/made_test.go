package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/rogpeppe/go-internal/goproxytest"
)

// small is a program that prints what derpd prints, and imports as little as possible.
const small = `package main

import (
	"os"

	_ "tailscale.com"
)

var version = "dev"

func main() { _, _ = os.Stdout.WriteString("derpd " + version + ", tailscale.com UPSTREAM\n") }
`

// imageBuilder makes images like a release. Docker builds the real ones, in docker/e2e.
type imageBuilder struct {
	programs map[string]map[string][]byte // by platform and release
	layers   map[string]v1.Layer          // by content; compressing takes long
}

// newImageBuilder compiles programs for all platforms.
func newImageBuilder(t *testing.T) *imageBuilder {
	t.Helper()
	b := &imageBuilder{programs: make(map[string]map[string][]byte), layers: make(map[string]v1.Layer)}
	env := append(os.Environ(), "GOPROXY="+goproxytest.NewTestServer(t, "testdata/modules", "").URL,
		"GOMODCACHE="+t.TempDir(), "GOFLAGS=-mod=mod -modcacherw", "GOSUMDB=off", "GOWORK=off", "GOENV=off", "CGO_ENABLED=0")
	for _, release := range []string{"1.104.10-1", "1.104.10-2", "1.104.11-1"} {
		on, _, _ := strings.Cut(release, "-")
		dir := t.TempDir()
		if err := os.MkdirAll(filepath.Join(dir, "cmd", "derpd"), 0o700); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{
			"go.mod":            "module derpd\n\ngo 1.27\n\nrequire tailscale.com v" + on + "\n",
			"cmd/derpd/main.go": strings.ReplaceAll(small, "UPSTREAM", "v"+on),
		} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for _, platform := range published {
			if on != "1.104.10" && platform != "linux/386" {
				continue // not used
			}
			target, err := v1.ParsePlatform(platform)
			if err != nil {
				t.Fatal(err)
			}
			build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w -buildid= -X main.version="+release, "-o", "derpd", "./cmd/derpd")
			build.Dir = dir
			build.Env = append(env[:len(env):len(env)], "GOOS="+target.OS, "GOARCH="+target.Architecture, "GOARM="+strings.TrimPrefix(target.Variant, "v"))
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("building for %s: %v\n%s", platform, err, out)
			}
			program, err := os.ReadFile(filepath.Join(dir, "derpd"))
			if err != nil {
				t.Fatal(err)
			}
			if b.programs[platform] == nil {
				b.programs[platform] = make(map[string][]byte)
			}
			b.programs[platform][release] = program
		}
	}
	return b
}

// imageToMake is an image for one platform before it is made.
type imageToMake struct {
	config  v1.ConfigFile
	program []byte
	mode    int64  // of the program
	owner   int    // of /data
	roots   []byte // certificates
	shell   []byte
	more    []byte // of another file
	padding int    // zeros after the end of a layer
	diffIDs bool   // other digests in the configuration than those of the layers
}

func on(platform string, change func(*imageToMake)) func(string, *imageToMake) {
	return func(p string, i *imageToMake) {
		if p == platform {
			change(i)
		}
	}
}

// index makes the index of an image for all platforms.
func (b *imageBuilder) index(t *testing.T, change func(string, *imageToMake)) v1.ImageIndex {
	t.Helper()
	index := v1.ImageIndex(empty.Index)
	for _, platform := range published {
		target, err := v1.ParsePlatform(platform)
		if err != nil {
			t.Fatal(err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: b.image(t, platform, change), Descriptor: v1.Descriptor{Platform: target}})
	}
	return index
}

// image makes the image for one platform. Its configuration is that of the Dockerfile.
func (b *imageBuilder) image(t *testing.T, platform string, change func(string, *imageToMake)) v1.Image {
	t.Helper()
	target, err := v1.ParsePlatform(platform)
	if err != nil {
		t.Fatal(err)
	}
	i := &imageToMake{program: b.programs[platform]["1.104.10-1"], mode: 0o755, owner: nonroot, roots: []byte("-----BEGIN CERTIFICATE-----\n")}
	i.config = v1.ConfigFile{
		OS: target.OS, Architecture: target.Architecture, Variant: target.Variant,
		Created: v1.Time{Time: time.Now().UTC().Truncate(time.Second)},
		Config: v1.Config{
			User: "65532:65532", Entrypoint: []string{"/derpd"}, StopSignal: "SIGTERM",
			Healthcheck:  &v1.HealthConfig{Test: []string{"CMD", "/derpd", "healthcheck"}, Interval: 10 * time.Second, Timeout: 6 * time.Second, StartPeriod: 30 * time.Second, Retries: 3},
			ExposedPorts: map[string]struct{}{"443/tcp": {}, "80/tcp": {}, "3478/udp": {}},
			Volumes:      map[string]struct{}{"/data": {}},
			Labels: map[string]string{
				versionLabel: "1.104.10-1", baseDigest: "sha256:" + strings.Repeat("13", 32),
				"org.opencontainers.image.title":       "derpd",
				"org.opencontainers.image.description": "A private DERP relay for Tailscale and Headscale",
				"org.opencontainers.image.licenses":    "BSD-3-Clause",
				"org.opencontainers.image.source":      "https://github.com/someone/derpd",
			},
		},
	}
	if change != nil {
		change(platform, i)
	}
	layers := []v1.Layer{
		b.layer(t,
			tarFile{tar.Header{Name: "bin/sh", Mode: 0o755}, []byte(elf)},
			tarFile{tar.Header{Name: "etc/removed/program", Mode: 0o755}, []byte(elf)},
			tarFile{tar.Header{Name: caFile, Mode: 0o644}, i.roots},
			tarFile{tar.Header{Name: "data/", Typeflag: tar.TypeDir, Mode: 0o755}, nil}),
		b.layer(t, tarFile{tar.Header{Name: binary, Mode: i.mode}, i.program}),
		b.layer(t,
			// Files that a layer removes are not in the image.
			tarFile{tar.Header{Name: "bin/.wh.sh"}, nil},
			tarFile{tar.Header{Name: "etc/.wh.removed"}, nil},
			tarFile{tar.Header{Name: "data/", Typeflag: tar.TypeDir, Mode: 0o755, Uid: i.owner, Gid: i.owner}, nil},
			tarFile{tar.Header{Name: "app/certs", Typeflag: tar.TypeSymlink, Linkname: "/data/certs"}, nil}),
	}
	if i.shell != nil {
		layers = append(layers, b.layer(t, tarFile{tar.Header{Name: "usr/bin/busybox", Mode: 0o755}, i.shell}))
	}
	if i.more != nil {
		layers = append(layers, b.layer(t, tarFile{tar.Header{Name: "more"}, i.more}))
	}
	if i.padding > 0 {
		layers = append(layers, b.compressed(t, make([]byte, i.padding)))
	}
	img, err := mutate.ConfigFile(empty.Image, &i.config)
	if err != nil {
		t.Fatal(err)
	}
	img, err = mutate.AppendLayers(img, layers...)
	if err != nil {
		t.Fatal(err)
	}
	if i.diffIDs {
		config, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		config = config.DeepCopy()
		config.RootFS.DiffIDs[1] = config.RootFS.DiffIDs[0]
		if img, err = mutate.ConfigFile(img, config); err != nil {
			t.Fatal(err)
		}
	}
	return img
}

// elf begins a program.
const elf = "\x7fELF"

type tarFile struct {
	header  tar.Header
	content []byte
}

func (b *imageBuilder) layer(t *testing.T, files ...tarFile) v1.Layer {
	t.Helper()
	var text bytes.Buffer
	w := tar.NewWriter(&text)
	for _, f := range files {
		f.header.Size = int64(len(f.content))
		if err := w.WriteHeader(&f.header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.compressed(t, text.Bytes())
}

func (b *imageBuilder) compressed(t *testing.T, text []byte) v1.Layer {
	t.Helper()
	if made, ok := b.layers[string(text)]; ok {
		return made
	}
	made, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(text)), nil },
		tarball.WithCompressedCaching, tarball.WithCompressionLevel(gzip.BestSpeed))
	if err != nil {
		t.Fatal(err)
	}
	b.layers[string(text)] = made
	return made
}

// noise returns bytes that cannot be compressed.
func noise(n int) []byte {
	content := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{}).Read(content)
	return content
}
