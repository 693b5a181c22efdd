package main

import (
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// startRegistry serves the base image of Debian 12 and of 13, and three more images:
// derpd for two platforms on Debian 13, an image without labels, and an index without
// platforms. Like GitHub's registry, it refuses requests without a token, and gives
// every client a token. It returns the URL, and the digest of the base image.
func startRegistry(t *testing.T) (address, digest string) {
	t.Helper()
	images := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	fill := httptest.NewServer(images)
	defer fill.Close()
	push := func(image string, write func(name.Reference) error) {
		t.Helper()
		ref, err := name.ParseReference(strings.TrimPrefix(fill.URL, "http://") + "/" + image)
		if err != nil {
			t.Fatal(err)
		}
		if err := write(ref); err != nil {
			t.Fatal(err)
		}
	}
	write := func(img v1.Image) func(name.Reference) error {
		return func(ref name.Reference) error { return remote.Write(ref, img) }
	}
	writeIndex := func(index v1.ImageIndex) func(name.Reference) error {
		return func(ref name.Reference) error { return remote.WriteIndex(ref, index) }
	}
	debian13 := labelled(t, map[string]string{"debian": "13"})
	hash, err := debian13.Digest()
	if err != nil {
		t.Fatal(err)
	}
	derpd := labelled(t, map[string]string{baseDigest: hash.String()})
	arm := labelled(t, map[string]string{"architecture": "arm64"})
	push("distroless/static-debian12:nonroot", write(labelled(t, map[string]string{"debian": "12"})))
	push("distroless/static-debian13:nonroot", write(debian13))
	push("someone/derpd", writeIndex(mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: derpd, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm"}}},
		mutate.IndexAddendum{Add: arm, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}}},
	)))
	push("someone/other", write(labelled(t, nil)))
	push("someone/nothing", writeIndex(empty.Index))

	var server *httptest.Server
	server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token" && r.FormValue("service") == "images" && strings.HasSuffix(r.FormValue("scope"), ":pull"):
			_, _ = io.WriteString(w, `{"token":"for everybody"}`)
		case r.URL.Path == "/token":
			http.Error(w, "", http.StatusForbidden)
		case r.Header.Get("Authorization") != "Bearer for everybody":
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+server.URL+`/token",service="images"`)
			http.Error(w, "", http.StatusUnauthorized)
		default:
			images.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(server.Close)
	return server.URL, hash.String()
}

func labelled(t *testing.T, labels map[string]string) v1.Image {
	t.Helper()
	img, err := mutate.Config(empty.Image, v1.Config{Labels: labels})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func TestImages(t *testing.T) {
	address, digest := startRegistry(t)
	from := images{registry: address}
	for image, want := range map[string]string{
		"gcr.io/distroless/static-debian13:nonroot":   digest,
		"gcr.io/distroless/static-debian13@" + digest: digest,
		"gcr.io/distroless/static-debian13":           errNoImage.Error(), // no tag latest
		"gcr.io/distroless/static-debian14:nonroot":   errNoImage.Error(),
		"gcr.io/Distroless/static":                    "could not parse reference",
	} {
		got, err := from.digest(t.Context(), image)
		if err != nil {
			got = err.Error()
		}
		if !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s, want %s", image, got, want)
		}
	}
	for image, want := range map[string]string{
		"ghcr.io/someone/derpd":        digest,
		"ghcr.io/someone/other:latest": "",
		"ghcr.io/someone/missing":      errNoImage.Error(),
		"ghcr.io/someone/nothing":      "the image has no platform",
		"ghcr.io/SOMEONE/derpd":        "could not parse reference",
	} {
		labels, err := from.labels(t.Context(), image)
		got := labels[baseDigest]
		if err != nil {
			got = err.Error()
		}
		if !strings.HasPrefix(got, want) || want == "" && got != "" {
			t.Errorf("%s is built on %q, want %q", image, got, want)
		}
	}
}

func TestReference(t *testing.T) {
	const hash = "sha256:1313131313131313131313131313131313131313131313131313131313131313"
	for _, test := range []struct{ registry, image, want string }{
		{"", "gcr.io/distroless/static-debian13:nonroot", "https gcr.io/distroless/static-debian13:nonroot"},
		{"", "localhost:5000/derpd", "http localhost:5000/derpd:latest"},
		{"", "mirror.example:5000/a/b:1.2", "https mirror.example:5000/a/b:1.2"},
		{"", "golang:1.27", "https index.docker.io/library/golang:1.27"},
		{"", "someone/derpd", "https index.docker.io/someone/derpd:latest"},
		{"https://mirror.example:5000", "golang:1.27", "https mirror.example:5000/library/golang:1.27"},
		{"http://mirror.example/", "gcr.io/a/b@" + hash, "http mirror.example/a/b@" + hash},
		{"mirror.example", "golang", `--registry: not a URL with a host (got "mirror.example"); use https://HOST`},
	} {
		got := ""
		if ref, err := (images{registry: test.registry}).reference(test.image); err != nil {
			got = err.Error()
		} else {
			got = ref.Context().Scheme() + " " + ref.Name()
		}
		if got != test.want {
			t.Errorf("%s of %q: %s, want %s", test.image, test.registry, got, test.want)
		}
	}
}

func TestNextBase(t *testing.T) {
	for image, want := range map[string]string{
		"gcr.io/distroless/static-debian9:nonroot": "gcr.io/distroless/static-debian10:nonroot",
		"gcr.io/distroless/static-debian13":        "gcr.io/distroless/static-debian14",
		"gcr.io/distroless/static:nonroot":         "",
		"debian:13":                                "",
	} {
		if got, ok := nextBase(image); got != want || ok != (want != "") {
			t.Errorf("%s: %q, %t; want %q", image, got, ok, want)
		}
	}
}
